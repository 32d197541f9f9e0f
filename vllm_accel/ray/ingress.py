"""The ingress: Ray's own OpenAI endpoint, which asks again when a replica dies."""

from fastapi import Request
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    WorkerCrashedError,
)
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import Response

from vllm_accel.ray.resend import answer

LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    RaySystemError,
    ReplicaUnavailableError,
)
"""What Ray raises for a replica that is gone; an error of the request is none of them."""


class RetryingIngress(OpenAiIngress):
    """Serve sends a request once. What was not begun to be answered is sent again."""

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """`/v1/chat/completions`."""
        ask = super().chat
        return await answer(lambda: ask(body, request), LOST)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """`/v1/completions`."""
        ask = super().completions
        return await answer(lambda: ask(body, request), LOST)
