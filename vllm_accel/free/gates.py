"""Who drafts with the first layers, and how far.

A draft goes on while the shallow model is sure enough. To add a gate, write a class with
the members of `ExitGate` and name it by its dotted path:
`"gate": "my_package.my_module:MyGate"`; it is made without arguments. Of `ExitSignals` it
may read the confidence, the entropy, or the exit states themselves.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vllm_accel.errors import ConfigError
from vllm_accel.free.exit_head import ExitSignals
from vllm_accel.free.goodput import ExitGoodput
from vllm_accel.free.quality import ExitQuality
from vllm_accel.free.stack import Seen
from vllm_accel.gating.beta_mixture import BetaMixture
from vllm_accel.gating.cost import StepShape

_FORGOTTEN = 0.01  # an observation that counts for less is dropped


@runtime_checkable
class ExitGate(Protocol):
    """Decides per request and step whether to draft, and per token whether to go on."""

    reason: str
    """Label of this gate's decisions in the metrics."""

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """[num_reqs] True where to run the shallow layers on the newest token.

        Args:
            req_ids: requests that have room for a draft.
            num_decoding: requests that decode, those without room included.
        """
        ...

    def exits(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] True where the shallow choice becomes a draft."""
        ...

    def final(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] True where in mode "exit" the choice, once a draft, is not verified.

        Asked after `exits`, and only in that mode.
        """
        ...

    def goes_on(self, req_ids: Sequence[str]) -> bool:
        """Whether another shallow step is to be run for those that just exited."""
        ...

    def learn(self, seen: Seen) -> None:
        """Takes in what the deep layers said of a stack."""
        ...

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes in the time from the end of the step before to this one's."""
        ...

    def keep_only(self, req_ids: Container[str]) -> None:
        """Forgets requests that ended."""
        ...


class Threshold:
    """Drafts where the confidence is above a number (FREE's rule).

    Args:
        threshold: in [0, 1], best probability less the second; below 0: always.
        reason: the gate's name.
    """

    def __init__(self, threshold: float, reason: str = "threshold") -> None:
        self.threshold = threshold
        self.reason = reason

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        return [True] * len(req_ids)

    def exits(self, said: ExitSignals) -> list[bool]:
        sure: list[bool] = (said.confidence > self.threshold).tolist()
        return sure

    def final(self, said: ExitSignals) -> list[bool]:
        return [True] * len(said)

    def goes_on(self, req_ids: Sequence[str]) -> bool:
        return True

    def learn(self, seen: Seen) -> None:
        pass

    def observe(self, shape: StepShape, seconds: float) -> None:
        pass

    def keep_only(self, req_ids: Container[str]) -> None:
        pass


class Never(Threshold):
    """Plain decoding, with the exit loaded."""

    def __init__(self) -> None:
        super().__init__(1.0, "never")

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        return [False] * len(req_ids)


@dataclass(frozen=True, slots=True)
class Learning:
    """How a threshold is learnt; by default as in FREE's code, for T5."""

    max_updates: int | None = 300
    """After so many it stays as it is, None: never. There is one whenever a step has new
    sequences."""
    min_observations: int = 0
    """Of agreement, and of disagreement, before there is a first update."""
    decay: float = 1.0
    """What is left of an observation's weight after each update."""


class LearntThreshold(Threshold):
    """FREE's estimator: the threshold is learnt from stacks that drafted, as published.

    Args:
        learning: where it is not to be as published.
    """

    def __init__(self, learning: Learning | None = None) -> None:
        self._estimator = BetaMixture()
        super().__init__(self._estimator.threshold(), "beta_mixture")
        self._learning = learning or Learning()
        self.updates = 0
        self._known: set[str] = set()
        self._confidence: list[float] = []
        self._agree: list[bool] = []
        self._weights: list[float] = []

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """See `ExitGate.admit`; a new sequence is when the threshold moves."""
        new = set(req_ids) - self._known
        if new and self._confidence and self._learns and self._has_seen_enough():
            self._update()
        self._known |= new
        return super().admit(req_ids, num_decoding)

    @property
    def _learns(self) -> bool:
        most = self._learning.max_updates
        return most is None or self.updates < most

    def _has_seen_enough(self) -> bool:
        agreed = sum(self._agree)
        return min(agreed, len(self._agree) - agreed) >= self._learning.min_observations

    def _update(self) -> None:
        confidence, agree = np.array(self._confidence), np.array(self._agree)
        self._estimator.fit(confidence, agree, np.array(self._weights))
        self.threshold = self._estimator.threshold()
        self.updates += 1
        left = [weight * self._learning.decay for weight in self._weights]
        old = sum(weight < _FORGOTTEN for weight in left)  # the oldest come first
        self._weights = left[old:]
        del self._confidence[:old], self._agree[:old]

    def learn(self, seen: Seen) -> None:
        """See `ExitGate.learn`; a stack without a draft tells nothing, as published."""
        if seen.drafted and self._learns:
            self._confidence += seen.confidence
            self._agree += seen.agree
            self._weights += [1.0] * len(seen.agree)

    def keep_only(self, req_ids: Container[str]) -> None:
        """See `ExitGate.keep_only`."""
        self._known = {known for known in self._known if known in req_ids}


def make_gate(
    name: str,
    *,
    draft_tokens: int,
    threshold: float,
    learning: Learning | None = None,
) -> ExitGate:
    """The gate of a name or dotted path.

    Args:
        draft_tokens: most tokens drafted per request and step.
        threshold: of the gate "threshold"; "quality" begins there.
        learning: of the gate "beta_mixture"; None: as published.

    Raises:
        ConfigError: the path cannot be imported or is not a gate.
    """
    built_in: Mapping[str, Callable[[], ExitGate]] = {
        "goodput": lambda: ExitGoodput(draft_tokens),
        "beta_mixture": lambda: LearntThreshold(learning),
        "threshold": lambda: Threshold(threshold),
        "quality": lambda: ExitQuality(draft_tokens, threshold),
        "always": lambda: Threshold(-1.0, "always"),
        "never": Never,
    }
    return built_in[name]() if name in built_in else _imported(name)


def _imported(path: str) -> ExitGate:
    try:
        gate: Any = resolve_name(path)()
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"Gate {path!r} cannot be made ({error}): expected one of free's gates, or the "
            "dotted path of an importable class that takes no argument."
        ) from error
    if not isinstance(gate, ExitGate):
        raise ConfigError(
            f"Gate {path!r} is not a gate: expected the members of "
            "vllm_accel.free.gates.ExitGate; add what is missing."
        )
    return gate
