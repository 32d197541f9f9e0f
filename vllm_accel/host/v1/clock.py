"""How long steps take, told to every worker with the step after."""

import time
from typing import Any

from vllm_accel.gating.cost import StepShape
from vllm_accel.host.report import StepTime


class StepClock:
    """Measures from the start of one step to the start of the next.

    The scheduler holds it: a worker sees neither the scheduler's share of a step nor the
    way between the processes, and workers that each read a clock of their own could
    decide differently.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._shape: StepShape | None = None

    def start(self) -> StepTime | None:
        """Starts a step; gives the time of the one before if nothing came between."""
        now = time.perf_counter()
        last = self._shape
        measured = StepTime(last, now - self._began) if last is not None else None
        self._began, self._shape = now, None
        return measured

    def end(self, scheduler_output: Any, drafted_for: int, *, busy: bool) -> None:
        """Ends a step.

        Args:
            drafted_for: requests the heads ran for.
            busy: there is more to do, so that the next step starts at once.
        """
        if busy and scheduler_output.total_num_scheduled_tokens:
            self._shape = shape_of(scheduler_output, drafted_for)


def shape_of(scheduler_output: Any, drafted_for: int) -> StepShape:
    """What a step had to do."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
    tokens = scheduler_output.num_scheduled_tokens
    decoding = [
        n
        for req_id, n in tokens.items()
        if req_id not in new and n == 1 + len(drafts.get(req_id, ()))
    ]
    rows = sum(decoding)
    prefill = scheduler_output.total_num_scheduled_tokens - rows
    return StepShape(rows, len(decoding), prefill, drafted_for)
