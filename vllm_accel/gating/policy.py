"""Gates: draft this step, or decode plainly? One decision per request.

A gate sees the signals of the requests that have room to draft and answers which of
them to draft for. To add one, write a class with the two members of `Gate` and name it
by its dotted path: `"gate": "my_package.my_module.MyGate"`. One that learns from
verdicts and from measured time has the members of `LearningGate`.
"""

import inspect
from collections.abc import Callable, Container, Mapping
from pkgutil import resolve_name
from typing import Any, Protocol, runtime_checkable

from vllm_accel.errors import ConfigError
from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.goodput import Goodput
from vllm_accel.gating.signals import DraftSignals, Signals


class Gate(Protocol):
    """Decides, per request and step, whether the heads draft.

    Under tensor parallelism the first rank's gate is asked, and all go by its word.
    """

    reason: str
    """Label of this gate's decisions in the metrics."""

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True where to draft."""
        ...


@runtime_checkable
class LearningGate(Protocol):
    """A gate that also cuts drafts and is told how they and the steps went."""

    reason: str

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True where the heads are to run.

        They do not if the engine had already queued the next step; then `lengths` is not
        called, and `admit` is asked again as soon as a step can draft.
        """
        ...

    def lengths(self, drafts: DraftSignals) -> list[int]:
        """How many draft tokens to verify of each request admitted just now."""
        ...

    def learn(self, req_id: str, verified: int, accepted: int) -> None:
        """Takes in how many of a request's verified draft tokens were accepted."""
        ...

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes in the time from the end of the step before to this one's."""
        ...

    def keep_only(self, req_ids: Container[str]) -> None:
        """Forgets requests that ended."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts from what another one learnt."""
        ...


class Unlearning:
    """Any gate as one that learns nothing and verifies whole drafts."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.reason = gate.reason

    def admit(self, signals: Signals) -> list[bool]:
        return self.gate.admit(signals)

    def lengths(self, drafts: DraftSignals) -> list[int]:
        return [drafts.draft_tokens] * len(drafts)

    def learn(self, req_id: str, verified: int, accepted: int) -> None:
        pass

    def observe(self, shape: StepShape, seconds: float) -> None:
        pass

    def keep_only(self, req_ids: Container[str]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Always:
    """Drafts on every step: Medusa's behaviour."""

    reason = "always"

    def admit(self, signals: Signals) -> list[bool]:
        return [True] * len(signals)


class Never:
    """Drafts on no step: plain decoding, with the heads loaded."""

    reason = "never"

    def admit(self, signals: Signals) -> list[bool]:
        return [False] * len(signals)


class EntropyThreshold:
    """Drafts where the target is sure of its next token (arXiv 2410.13344).

    Args:
        threshold: nats; the gate is open below it.
    """

    reason = "entropy"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def admit(self, signals: Signals) -> list[bool]:
        admitted: list[bool] = (signals.entropy < self.threshold).tolist()
        return admitted


def make_gate(name: str, *, draft_tokens: int, entropy_threshold: float) -> LearningGate:
    """The gate of a name or dotted path.

    Args:
        draft_tokens: most tokens drafted per request and step.
        entropy_threshold: nats, for the gate "entropy".

    Raises:
        ConfigError: the path cannot be imported or is not a gate.
    """
    built_in: Mapping[str, Callable[[], Any]] = {
        "goodput": lambda: Goodput(draft_tokens),
        "always": Always,
        "never": Never,
        "entropy": lambda: EntropyThreshold(entropy_threshold),
    }
    gate = built_in[name]() if name in built_in else _imported(name, draft_tokens)
    return gate if isinstance(gate, LearningGate) else Unlearning(gate)


def _imported(path: str, draft_tokens: int) -> Gate:
    try:
        made = resolve_name(path)
        wants = "draft_tokens" in inspect.signature(made).parameters
        gate: Any = made(draft_tokens=draft_tokens) if wants else made()
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"Gate {path!r} cannot be made ({error}): expected goodput, entropy, always, "
            "never or the dotted path of an importable class that takes no argument, or "
            "draft_tokens alone."
        ) from error
    admits = callable(getattr(gate, "admit", None))
    if not admits or not isinstance(getattr(gate, "reason", None), str):
        raise ConfigError(
            f"Gate {path!r} is not a gate: expected members `reason` and "
            "`admit(signals)`; see vllm_accel.gating.policy.Gate."
        )
    return gate  # type: ignore[no-any-return]  # checked by shape just above
