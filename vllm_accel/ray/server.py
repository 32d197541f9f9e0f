"""The server of one replica: Ray's own, which ends as soon as its engine is dead.

A live actor with a dead engine is a trap: it answers 500 in no time, so the router
prefers it, until its health has been checked three times. A dead actor is dropped at
once.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ray import serve
from ray.serve.llm.deployment import LLMServer
from ray.util.metrics import Counter

from vllm_accel.host import metrics
from vllm_accel.ray.app import SHARE_GATE
from vllm_accel.ray.counters import CounterExport, accel_samples
from vllm_accel.ray.gate_sharing import SharedGate

logger = logging.getLogger("ray.serve")

LOOK_EVERY_S = 0.2
EXPORT_EVERY_S = 1.0
SHARE_EVERY_S = 5.0


class FastFailServer(LLMServer):
    """Ends its process instead of answering for a dead engine."""

    async def start(self) -> None:
        """Starts the engine, then what watches it, counts and shares beside it."""
        replica = serve.get_replica_context()
        config = await self.llm_config()
        shared = None
        if config.experimental_configs.get(SHARE_GATE):
            shared = SharedGate.join(config, replica.rank.rank, replica.replica_tag)
            config.update_engine_kwargs(**await shared.starting_point(config))
        metrics.open_reader()
        await super().start()
        export = CounterExport(replica.replica_tag, Counter)
        self._beside = [
            _every(LOOK_EVERY_S, self._end_if_dead),
            _every(EXPORT_EVERY_S, lambda: _exported(export)),
        ]
        if shared is not None:
            self._beside.append(_every(SHARE_EVERY_S, shared.publish))

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """See `LLMServer.chat`."""
        return self._watched(await super().chat(request, raw_request_info))

    async def completions(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncIterator[Any]:
        """See `LLMServer.completions`."""
        return self._watched(await super().completions(request, raw_request_info))

    async def _watched(self, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Lets no answer out that a dead engine gave: vLLM words them as its own errors."""
        try:
            async for part in answers:
                await self._end_if_dead()
                yield part
        except Exception:
            await self._end_if_dead()
            raise

    async def _end_if_dead(self) -> None:
        try:
            await self.check_health()
        except Exception as error:  # noqa: BLE001  any answer but "healthy" is the end
            end_process(repr(error))


def end_process(reason: str) -> None:
    """Ends this replica at once; Serve drops it and starts another."""
    logger.error("the engine is dead, so this replica ends: %s", reason)
    for handler in logging.getLogger("ray.serve").handlers:
        handler.flush()
    os._exit(1)


async def _exported(export: CounterExport) -> None:
    export.add(accel_samples())


def _every(seconds: float, act: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
    """Runs something again and again beside the requests."""

    async def run() -> None:
        while True:
            await asyncio.sleep(seconds)
            await act()

    task = asyncio.create_task(run())
    task.add_done_callback(_tell)
    return task


def _tell(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task beside the requests ended", exc_info=task.exception())
