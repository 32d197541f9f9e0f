"""How long steps take, told to every worker with the step after."""

import time
from typing import Any

from vllm_accel.gating.cost import StepShape
from vllm_accel.host.report import StepTime
from vllm_accel.speculate import StepReport


class StepClock:
    """Measures from the end of one step to the end of the next.

    The scheduler holds it: a worker sees neither the scheduler's share of a step nor the
    way between the processes, and workers that each read a clock of their own could
    decide differently. Ends, not starts: a step that is queued ahead starts early.
    """

    def __init__(self) -> None:
        self._ended: float | None = None

    def end(
        self, scheduler_output: Any, report: StepReport, *, busy: bool
    ) -> StepTime | None:
        """Ends a step; gives its time if the engine was at nothing else meanwhile.

        Args:
            report: what the worker did besides.
            busy: there is more to do, so that the next step follows at once.
        """
        now = time.perf_counter()
        began, self._ended = self._ended, now if busy else None
        if began is None or not scheduler_output.total_num_scheduled_tokens:
            return None
        shape = shape_of(scheduler_output, report)
        return StepTime(shape, now - began)


def shape_of(scheduler_output: Any, report: StepReport) -> StepShape:
    """What a step had to do: room for drafts that stayed empty is no row."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
    tokens = scheduler_output.num_scheduled_tokens
    decoding = [
        n
        for req_id, n in tokens.items()
        if req_id not in new and n == 1 + len(drafts.get(req_id, ()))
    ]
    rows = len(decoding) + sum(report.verified.values())
    prefill = scheduler_output.total_num_scheduled_tokens - sum(decoding)
    return StepShape(
        rows,
        len(decoding),
        prefill,
        report.drafted_for,
        report.shallow_steps,
        report.shallow_rows,
        report.kept_rows,
    )
