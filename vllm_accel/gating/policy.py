"""Gates: draft this step, or decode plainly? One decision per request.

A gate sees the signals of the requests that have room to draft and answers which of
them to draft for. To add one, write a class with the two members of `Gate` and name it
by its dotted path: `"gate": "my_package.my_module.MyGate"`.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, Protocol

from vllm_accel.errors import ConfigError
from vllm_accel.gating.signals import Signals


class Gate(Protocol):
    """Decides, per request and step, whether the heads draft.

    The answer may depend on the signals and on earlier answers only: under tensor
    parallelism every rank asks its own copy, and all must agree.
    """

    reason: str
    """Label of this gate's decisions in the metrics."""

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True where to draft."""
        ...


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


def make_gate(name: str, *, entropy_threshold: float) -> Gate:
    """The gate of a name or dotted path.

    Raises:
        ConfigError: the path cannot be imported or is not a gate.
    """
    built_in: Mapping[str, Gate] = {
        "always": Always(),
        "never": Never(),
        "entropy": EntropyThreshold(entropy_threshold),
    }
    return built_in[name] if name in built_in else _imported(name)


def _imported(path: str) -> Gate:
    try:
        gate: Any = resolve_name(path)()
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"Gate {path!r} cannot be made ({error}): expected entropy, always, never "
            "or the dotted path of an importable class that takes no arguments."
        ) from error
    admits = callable(getattr(gate, "admit", None))
    if not admits or not isinstance(getattr(gate, "reason", None), str):
        raise ConfigError(
            f"Gate {path!r} is not a gate: expected members `reason` and "
            "`admit(signals)`; see vllm_accel.gating.policy.Gate."
        )
    return gate  # type: ignore[no-any-return]  # checked by shape just above
