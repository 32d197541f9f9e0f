"""What we send along on vLLM's own step objects, between scheduler and worker.

`SchedulerOutput` and `ModelRunnerOutput` have no free field, but a plain attribute
survives the pickling between the two processes.
"""

from dataclasses import dataclass
from typing import Any

from vllm_accel.cerberus.drafter import StepReport
from vllm_accel.gating.cost import StepShape

_ATTRIBUTE = "vllm_accel"


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a finished step took."""

    shape: StepShape
    seconds: float
    """From its start to the start of the next."""


def attach(output: Any, value: StepReport | StepTime) -> None:
    """Puts a worker's report on its output, or a measured time on the next step."""
    setattr(output, _ATTRIBUTE, value)


def attached(output: Any) -> Any:
    """What the other side put there; None if nothing."""
    return vars(output).get(_ATTRIBUTE)
