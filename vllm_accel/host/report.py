"""A step's report, carried from worker to scheduler on vLLM's own step output.

`ModelRunnerOutput` has no free field, but a plain attribute survives the pickling
between the two processes.
"""

from typing import Any

from vllm_accel.cerberus.drafter import StepReport

_ATTRIBUTE = "vllm_accel_report"


def attach(output: Any, report: StepReport) -> None:
    """Puts a report on a ModelRunnerOutput."""
    setattr(output, _ATTRIBUTE, report)


def attached(output: Any) -> StepReport | None:
    """The report a worker put there, None for a step that sampled nothing."""
    report: StepReport | None = vars(output).get(_ATTRIBUTE)
    return report
