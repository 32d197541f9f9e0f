"""Hook on `EngineCore.step`: queue a step while the one before still runs.

vLLM does so on GPUs. A step is scheduled with room for drafts that are not known yet, and
the workers fill it in (`host/v1/room.py`). Where a grammar has to see a token before the
next step, the engine takes every step's output first.
"""

from collections import deque
from functools import wraps
from typing import Any

from vllm.v1.engine.core import EngineCore

from vllm_accel.host import carrier

Stepped = tuple[Any, bool]
"""(outputs by client or None, whether the model was executed)"""

QUEUED = 2
"""Steps on their way at most: one that runs and one that waits."""


def apply() -> None:
    """Wraps `EngineCore.step` once."""
    original = EngineCore.step
    if hasattr(original, "vllm_accel_original"):
        return

    @wraps(original)
    def step(self: EngineCore) -> Stepped:
        if not carrier.is_loaded(self.vllm_config):
            return original(self)
        self.async_scheduling = True  # post_step: no trip for drafts
        if not self.scheduler.can_run_ahead:
            return original(self)
        if self.batch_queue is None:
            _make_queue(self)
        return self.step_with_batch_queue() if self.scheduler.runs_ahead else _wait(self)

    step.vllm_accel_original = original
    EngineCore.step = step


def remove() -> None:
    """Puts the original back."""
    original = getattr(EngineCore.step, "vllm_accel_original", None)
    if original is not None:
        EngineCore.step = original


def _make_queue(core: EngineCore) -> None:
    """What EngineCore makes for asynchronous scheduling.

    In the core and not in its config: the workers' runner is to stay the synchronous one,
    which knows each step's tokens before it takes up the next, and vLLM refuses the option
    with custom_class whenever it checks the config again.
    """
    core.batch_queue_size = QUEUED
    core.batch_queue = deque(maxlen=QUEUED)


def _wait(core: EngineCore) -> Stepped:
    """Two calls of vLLM's own: one schedules and queues, one takes what is queued.

    With a step left over from running ahead the second call alone.
    """
    # A step left over is not executed in this call, and says so to data-parallel ranks,
    # which fill in for it; nobody else shall sleep over a call without one.
    executed = core.vllm_config.parallel_config.data_parallel_size == 1
    if not core.batch_queue:
        outputs, executed = core.step_with_batch_queue()
        if outputs is not None or not core.batch_queue:
            return outputs, executed
    with core.scheduler.scheduling_held():
        outputs, _ = core.step_with_batch_queue()
    return outputs, executed
