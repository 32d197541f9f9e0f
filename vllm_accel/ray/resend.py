"""Asking again when the replica that was to answer is gone.

Before the first token nobody has seen anything, so another replica can answer in full.
After it the client must be told: an event with an error, and no `[DONE]`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

logger = logging.getLogger("ray.serve")

MOST_ATTEMPTS = 3
"""A request that kills every engine that reads it must not kill them all."""

PAUSE_S = 0.1

Lost = tuple[type[BaseException], ...]
"""Exceptions that mean: the replica is gone, not: the request is wrong."""


async def answer(ask: Callable[[], Awaitable[Response]], lost: Lost) -> Response:
    """The response to a request, by whichever replica stays alive.

    Args:
        ask: sends the request; its response to a stream comes with the first token.
        lost: what it raises when the replica dies.
    """
    for attempt in range(1, MOST_ATTEMPTS + 1):
        try:
            return _told_if_lost(await ask(), lost)
        except lost as error:
            logger.warning("replica lost before its answer, attempt %d: %s", attempt, error)
            await asyncio.sleep(PAUSE_S)
    return JSONResponse(
        _error(f"{MOST_ATTEMPTS} replicas died before they answered.", 503),
        status_code=503,
    )


def _told_if_lost(response: Response, lost: Lost) -> Response:
    if isinstance(response, StreamingResponse):
        response.body_iterator = until_lost(response.body_iterator, lost)
    return response


async def until_lost(chunks: AsyncIterable[Any], lost: Lost = ()) -> AsyncIterator[Any]:
    """A stream of server-sent events that ends with an error event when it breaks.

    Whatever breaks it: a stream that just stops looks complete to an OpenAI client.
    """
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:  # noqa: BLE001  the client has to hear of any
        logger.warning("stream broken after its first token: %r", error)
        message = "The stream broke off: the answer is not complete."
        if isinstance(error, lost):
            message = "The replica died while it answered: the answer is not complete."
        yield f"data: {json.dumps(_error(message, 500))}\n\n"


def _error(message: str, code: int) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    kind = "ReplicaLost"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
