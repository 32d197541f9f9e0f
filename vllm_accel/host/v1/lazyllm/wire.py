"""What scheduler and workers tell each other about pages, on vLLM's own step objects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_accel.lazyllm.pruner import PruneCounts
from vllm_accel.paging import PageAnswer, PageReport

_ATTRIBUTE = "vllm_accel_pages"


@dataclass(frozen=True, slots=True)
class PageOrders:
    """From scheduler to workers, with a step."""

    answer: PageAnswer
    aux: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """{req_id: block ids of its Aux Cache} of requests new in this step, or resumed, that
    may be pruned: the scheduler has the word, as it has published their pages or not."""


@dataclass(frozen=True, slots=True)
class PruneReport:
    """From worker to scheduler, with a step's output."""

    pages: PageReport
    counts: PruneCounts


def attach(output: Any, value: PageOrders | PruneReport) -> None:
    """Puts orders on a SchedulerOutput, or a report on a ModelRunnerOutput."""
    setattr(output, _ATTRIBUTE, value)


def attached(output: Any) -> Any:
    """What the other side put there; None if nothing."""
    return vars(output).get(_ATTRIBUTE)
