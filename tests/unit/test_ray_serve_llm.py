"""Our classes in Ray Serve LLM's place, without a cluster."""

import asyncio
import json
import os
from types import SimpleNamespace

import pytest

# Ray starts a cluster where it is asked for one it has not; here that is a mistake.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
pytest.importorskip("ray")
pytest.importorskip("pyarrow")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.llm import LLMConfig, LLMServingArgs
from ray.serve.llm.ingress import make_fastapi_ingress
from ray.serve.llm.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionResponse,
)
from starlette.requests import Request

from vllm_accel import ConfigError
from vllm_accel.ray import app, resend, server
from vllm_accel.ray.ingress import LOST, RetryingIngress
from vllm_accel.ray.server import FastFailServer
from vllm_accel.ray.settings import ReplicaSettings

WHOLE = CompletionResponse(
    model="m",
    choices=[{"index": 0, "text": "def main():", "finish_reason": "stop"}],
    usage={"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
)
STREAM = [
    [f'data: {{"choices": [{{"index": 0, "text": "{word}"}}]}}\n\n'] for word in "abc"
]


def settings(**more):
    return ReplicaSettings(model="m", accelerator="cpu", **more)


# The app


def test_ray_takes_what_we_build():
    given = settings(
        replicas=2,
        speculative_config="cerberus",
        engine_args={"max_model_len": 64, "tensor_parallel_size": 2},
        threads=2,
    )
    args = LLMServingArgs.model_validate(app.serving_args(given))
    (config,) = args.llm_configs
    engine = config.get_engine_config()
    assert config.server_cls is FastFailServer
    assert args.ingress_cls_config.ingress_cls is RetryingIngress
    assert engine.placement_bundles == [{"CPU": 1.5}] * 2
    kwargs = engine.get_initialization_kwargs()
    assert kwargs["speculative_config"] == "cerberus"
    assert kwargs["distributed_executor_backend"] == "mp"


def test_an_unknown_engine_argument_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="max_modl_len"):
        app.built(settings(engine_args={"max_modl_len": 64}))


def test_the_routes_are_rays_own():
    made = make_fastapi_ingress(RetryingIngress)
    assert issubclass(made, RetryingIngress)
    assert made.chat is not RetryingIngress.chat or made.chat == RetryingIngress.chat


# The ingress


class Handle:
    """A deployment's handle; each call is answered by the next of `answers`."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.calls = 0

    def options(self, **_):
        return self

    @property
    def completions(self):
        return self

    chat = completions

    def remote(self, *_):
        self.calls += 1
        return self.answers[self.calls - 1]()


def answers(*parts):
    """A replica's parts; an exception among them is its death."""

    async def stream():
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return stream


def died():
    return ActorDiedError()


def asked(*replicas, stream=False, chat=False):
    """(status, text, calls) of one request to the real ingress."""

    async def run():
        handle = Handle(replicas)
        ingress = RetryingIngress({"m": handle}, {"m": None})
        raw = Request({"type": "http", "headers": []})
        if chat:
            messages = [{"role": "user", "content": "p"}]
            request = ChatCompletionRequest(model="m", messages=messages, stream=stream)
            response = await ingress.chat(request, raw)
        else:
            request = CompletionRequest(model="m", prompt="p", stream=stream)
            response = await ingress.completions(request, raw)
        if hasattr(response, "body_iterator"):
            text = "".join([part async for part in response.body_iterator])
        else:
            text = response.body.decode()
        return response.status_code, text, handle.calls

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(resend, "PAUSE_S", 0.0)


@pytest.mark.parametrize("chat", [False, True])
def test_a_request_whose_replica_dies_is_answered_by_another(chat):
    status, text, calls = asked(answers(died()), answers(WHOLE), chat=chat)
    assert (status, calls) == (200, 2)
    assert json.loads(text)["choices"][0]["text"] == "def main():"


def test_a_stream_whose_replica_dies_before_it_began_is_begun_elsewhere():
    status, text, calls = asked(answers(died()), answers(*STREAM), stream=True)
    assert (status, calls) == (200, 2)
    assert text.endswith("data: [DONE]\n\n")


def test_a_stream_whose_replica_dies_later_ends_with_an_error():
    status, text, calls = asked(answers(STREAM[0], died()), stream=True)
    assert (status, calls) == (200, 1)
    assert "ReplicaLost" in text
    assert "[DONE]" not in text


def test_an_engines_own_error_is_not_asked_again():
    with pytest.raises(ValueError, match="too long"):
        asked(answers(ValueError("too long")), answers(WHOLE))


def test_errors_of_a_task_are_not_the_loss_of_a_replica():
    assert not issubclass(RayTaskError, LOST)
    assert issubclass(ActorDiedError, LOST)


# The server


class Engine:
    """As Ray's engine: streams STREAM, and is dead from part `dies_at` on."""

    def __init__(self, dies_at=None):
        self.dies_at = dies_at
        self.dead = False

    async def check_health(self):
        if self.dead:
            raise RuntimeError("EngineDeadError")

    async def completions(self, request, raw_request_info):
        for place, part in enumerate(STREAM):
            if place == self.dies_at:
                self.dead = True  # vLLM words it as an event of its own
                yield 'data: {"error": {"message": "EngineCore", "code": 500}}\n\n'
                yield "data: [DONE]\n\n"
                return
            yield part[0]
            await asyncio.sleep(0.06)  # longer than Ray gathers parts for a batch


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch):
    def end(reason):
        raise Ended(reason)

    monkeypatch.setattr(server, "end_process", end)


def parts_of(engine):
    async def run():
        config = LLMConfig(
            model_loading_config={"model_id": "m"}, accelerator_config={"kind": "cpu"}
        )
        replica = FastFailServer.sync_init(config, engine_cls=Engine)
        replica.engine = engine
        request = CompletionRequest(model="m", prompt="p", stream=True)
        parts = []
        try:
            async for part in await replica.completions(request):
                parts += part
        except Ended as end:
            parts.append(end)
        return parts

    return asyncio.run(run())


def test_a_living_engine_is_passed_on(ends):
    assert parts_of(Engine()) == [part[0] for part in STREAM]


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_nothing_a_dead_engine_says_gets_out(ends, dies_at):
    *said, end = parts_of(Engine(dies_at))
    assert isinstance(end, Ended)
    # Ray sends parts in batches: one that holds the engine's last words is held back whole.
    before = [part[0] for part in STREAM[:dies_at]]
    assert said == before[: len(said)]


def test_an_idle_replica_ends_with_its_engine(ends):
    async def run():
        config = LLMConfig(
            model_loading_config={"model_id": "m"}, accelerator_config={"kind": "cpu"}
        )
        replica = FastFailServer.sync_init(config, engine_cls=Engine)
        replica.engine = Engine()
        watch = server._every(0.001, replica._end_if_dead)
        await asyncio.sleep(0.02)
        assert not watch.done()
        replica.engine.dead = True
        await asyncio.wait([watch], timeout=5)
        return watch

    with pytest.raises(Ended):
        asyncio.run(run()).result()


@pytest.fixture
def replica(monkeypatch):
    """replica(share_gate) -> a server that has started, without Serve around it."""
    context = SimpleNamespace(rank=SimpleNamespace(rank=1), replica_tag="a")
    monkeypatch.setattr(server.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(server.metrics, "open_reader", lambda: None)
    monkeypatch.setattr(FastFailServer, "_start_engine", started)
    monkeypatch.setattr(server, "CounterExport", lambda *_: SimpleNamespace(add=list))
    board = SimpleNamespace(starting_point=named, publish=nothing)
    monkeypatch.setattr(server.SharedGate, "join", lambda *_: board)

    async def start(share_gate):
        config = LLMConfig(
            model_loading_config={"model_id": "m"},
            accelerator_config={"kind": "cpu"},
            engine_kwargs={"speculative_config": "cerberus"},
            experimental_configs={app.SHARE_GATE: share_gate},
        )
        replica = FastFailServer.sync_init(config, engine_cls=Made)
        await replica.start()
        return replica

    return start


class Made(Engine):
    """An engine that remembers what it was made of."""

    def __init__(self, config):
        super().__init__()
        self.kwargs = dict(config.engine_kwargs)


async def started(replica):
    pass


async def nothing():
    pass


async def named(config):
    return {"speculative_config": {"method": "cerberus", "gate_state": "file"}}


@pytest.mark.parametrize(
    ("share_gate", "beside", "made_of"),
    [
        (False, 2, "cerberus"),
        (True, 3, {"method": "cerberus", "gate_state": "file"}),
    ],
)
def test_a_replica_starts_with_all_that_stands_beside_it(
    replica, share_gate, beside, made_of
):
    async def run():
        up = await replica(share_gate)
        assert up.engine.kwargs["speculative_config"] == made_of
        assert [task.done() for task in up._beside] == [False] * beside
        for task in up._beside:
            task.cancel()

    asyncio.run(run())


def test_the_end_is_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    server.end_process("dead")
    assert codes == [1]
