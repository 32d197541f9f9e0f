"""What we send along on vLLM's own step objects, between scheduler and worker.

`SchedulerOutput` and `ModelRunnerOutput` have no free field, but a plain attribute
survives the pickling between the two processes.
"""

from dataclasses import dataclass
from typing import Any

from vllm_accel.gating.cost import StepShape
from vllm_accel.speculate import StepReport

_ATTRIBUTE = "vllm_accel"


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a finished step took."""

    shape: StepShape
    seconds: float
    """From the end of the one before to its own."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What the scheduler tells the workers with a step."""

    most_drafts: int
    """Of one request, that the next step will have room for."""
    keep_drafts: bool
    """The next step is scheduled without knowing the drafts: the workers fill them in."""
    measured: list[StepTime]
    """Of the steps that ended since the last orders."""


def attach(output: Any, value: StepReport | Orders) -> None:
    """Puts a worker's report on its output, or orders on a step."""
    setattr(output, _ATTRIBUTE, value)


def attached(output: Any) -> Any:
    """What the other side put there; None if nothing."""
    return vars(output).get(_ATTRIBUTE)
