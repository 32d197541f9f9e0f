"""Asking again, against replicas that die before or after their first token.

The replicas are small ASGI apps; in front of them stands `resend.answer` on a real port,
and the client is OpenAI's.
"""

import asyncio
import importlib.util
import json
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from openai import APIError, InternalServerError, OpenAI
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from vllm_accel.ray import resend

uvicorn = pytest.importorskip("uvicorn")

WORDS = ["def ", "main", "():"]


class Gone(Exception):
    """What a replica's death looks like to the one who asked it."""


def replica(dies_after):
    """An ASGI app that streams WORDS, and dies after so many of them; None: never."""

    async def app(scope, receive, send):
        stream = json.loads((await receive())["body"]).get("stream")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for place, word in enumerate(WORDS):
            if place == dies_after:
                raise Gone(f"after {place}")
            if stream:
                await send(body(event({"choices": [choice(word)]}), more=True))
                await asyncio.sleep(0.01)
        if dies_after == len(WORDS):
            raise Gone("before it was done")
        whole = {"id": "1", "object": "text_completion", "model": "m", "created": 0}
        whole["choices"] = [choice("".join(WORDS), "stop")]
        await send(body("data: [DONE]\n\n" if stream else json.dumps(whole)))

    return app


def choice(text, finish_reason=None):
    return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}


def event(value):
    return f"data: {json.dumps(value)}\n\n"


def body(text, *, more=False):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def asked(app, request):
    """As Ray's ingress asks a replica: a response as soon as its first part is there."""
    parts: asyncio.Queue = asyncio.Queue()

    async def receive():
        return {"type": "http.request", "body": json.dumps(request).encode()}

    async def run():
        try:
            await app({"type": "http"}, receive, parts.put)
        except Gone as death:
            await parts.put(death)

    task = asyncio.create_task(run())
    first = await next_part(parts)
    if not request.get("stream"):
        await task
        return JSONResponse(json.loads(first[0]))

    async def stream():
        part = first
        while True:
            yield part[0]
            if part[1]:
                return
            part = await next_part(parts)

    return StreamingResponse(stream(), media_type="text/event-stream")


async def next_part(parts):
    """(text, whether it is the last)"""
    while True:
        message = await parts.get()
        if isinstance(message, Gone):
            raise message
        if message["type"] == "http.response.body":
            return message["body"].decode(), not message["more_body"]


class Front:
    """`resend.answer` before replicas that are asked in turn."""

    def __init__(self, *replicas):
        self.replicas = list(replicas)
        self.asked = 0

    async def complete(self, request):
        said = await request.json()

        def ask():
            self.asked += 1
            return asked(self.replicas[self.asked - 1], said)

        return await resend.answer(ask, (Gone,))


@pytest.fixture
def served(monkeypatch):
    """served(*replicas) -> (client, front)"""
    monkeypatch.setattr(resend, "PAUSE_S", 0.0)
    servers = []

    def start(*replicas):
        front = Front(*replicas)
        app = Starlette(routes=[Route("/v1/completions", front.complete, methods=["POST"])])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        config = uvicorn.Config(app, port=port, log_level="error", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port}/v1"
        return OpenAI(base_url=url, api_key="none", max_retries=0), front

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def ask(client, **more):
    return client.completions.create(model="m", prompt="p", **more)


def streamed(client):
    return [part.choices[0].text for part in ask(client, stream=True)]


@pytest.mark.parametrize("dies_after", [0, 1, 2, 3])
def test_an_answer_in_one_piece_is_never_lost(served, dies_after):
    client, front = served(replica(dies_after), replica(None))
    assert ask(client).choices[0].text == "def main():"
    assert front.asked == 2


def test_a_stream_that_has_not_begun_is_begun_elsewhere(served):
    client, front = served(replica(0), replica(0), replica(None))
    assert streamed(client) == WORDS
    assert front.asked == 3


@pytest.mark.parametrize("dies_after", [1, 2, 3])
def test_a_stream_that_has_begun_ends_with_an_error_and_no_done(served, dies_after):
    client, front = served(replica(dies_after), replica(None))
    words = []
    with pytest.raises(APIError, match="not complete"):
        words.extend(part.choices[0].text for part in ask(client, stream=True))
    assert front.asked == 1


def test_the_bytes_of_a_broken_stream(served):
    client, _ = served(replica(2))
    request = {"model": "m", "prompt": "p", "stream": True}
    response = httpx.post(f"{client.base_url}completions", json=request)
    *words, last = response.text.strip().split("\n\n")
    assert len(words) == 2
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "ReplicaLost"
    assert "[DONE]" not in response.text


def test_a_whole_stream_is_passed_on_as_it_is(served):
    client, _ = served(replica(None))
    request = {"model": "m", "prompt": "p", "stream": True}
    response = httpx.post(f"{client.base_url}completions", json=request)
    assert response.text.count("data: ") == len(WORDS) + 1
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_request_that_kills_whoever_reads_it_is_given_up(served):
    client, front = served(*[replica(0)] * 5)
    with pytest.raises(InternalServerError) as refused:
        ask(client)
    assert refused.value.status_code == 503
    assert front.asked == resend.MOST_ATTEMPTS


def test_the_kill_example_tells_errors_from_silence(served):
    file = Path(__file__).parents[2] / "examples" / "ray_kill.py"
    spec = importlib.util.spec_from_file_location("ray_kill", file)
    ray_kill = sys.modules["ray_kill"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ray_kill)
    traffic = ray_kill.Traffic("", threads=0)
    client, _ = served(replica(2), replica(None), replica(None))
    assert traffic.stream(client, 0) == "error"
    assert traffic.stream(client, 0) == "silent"  # our replicas give no finish_reason
    assert traffic.unary(client, 0) == "ok"


def test_errors_of_the_request_are_not_asked_again():
    asked = []

    async def wrong():
        asked.append(1)
        raise ValueError("no such parameter")

    with pytest.raises(ValueError, match="no such parameter"):
        asyncio.run(resend.answer(wrong, (Gone,)))
    assert len(asked) == 1


def test_any_break_of_a_stream_is_told():
    async def breaks():
        yield "data: 1\n\n"
        raise RuntimeError("something else")

    async def read():
        return [part async for part in resend.until_lost(breaks(), (Gone,))]

    first, last = asyncio.run(read())
    assert first == "data: 1\n\n"
    assert "broke off" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_a_client_that_leaves_is_no_break():
    async def endless():
        while True:
            yield "data: 1\n\n"

    async def read():
        stream = resend.until_lost(endless())
        await anext(stream)
        await stream.aclose()

    asyncio.run(read())
