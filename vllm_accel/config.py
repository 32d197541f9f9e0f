"""What a user may set, frozen and checked.

One dataclass per method. It is what every way of switching on ends in (command line,
`LLM(...)`, `engine_args(...)`), and what travels to the engine's processes, so it holds
nothing that changes from run to run: vLLM hashes it into its compile-cache key.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_accel.errors import ConfigError, refuse_unknown_keys

METHODS = ("cerberus", "free")
"""Methods this version can run."""

ELSEWHERE = ("lazyllm",)
"""Names of ours that draft nothing: refused, saying where they are switched on."""

MAX_DRAFT_TOKENS = 16

GATES = ("goodput", "entropy", "always", "never")
"""Gates of cerberus that come with this package."""

MODES = ("verify", "exit")
"""What becomes of free's drafts."""

EXIT_GATES = ("goodput", "quality", "threshold", "beta_mixture", "always", "never")
"""Gates of free that come with this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What a user writes, and back."""

    method: str

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """The config a JSON object or keyword arguments describe.

        Raises:
            ConfigError: a key is unknown or a value is not allowed.
        """
        fields = dataclasses.fields(cls)
        known = [field.name for field in fields]
        refuse_unknown_keys(settings, known, f"for method {fields[0].default!r}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_mapping` gives the same config back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CerberusConfig(_Settings):
    """Settings of the Cerberus method (arXiv 2410.13344)."""

    method: str = "cerberus"
    """Always "cerberus"."""

    model: str | None = None
    """Draft heads: a folder or a hub id. None: the folder `cerberus` of the model."""

    revision: str | None = None
    """Branch, tag or commit, when `model` is a hub id."""

    num_speculative_tokens: int | None = None
    """Most tokens drafted per step, 1 to the number of heads. None: every head."""

    gate: str = "goodput"
    """Who decides per request and step whether to draft: "goodput" by measured cost,
    "entropy", "always", "never", or the dotted path of a class like those in
    `vllm_accel.gating.policy`."""

    gate_state: str | None = None
    """A file that keeps what the gate learnt, for the next engine to start from."""

    entropy_threshold: float | None = None
    """Draft where the target's entropy is below this (nats). None: what the heads'
    training measured as best."""

    run_ahead: bool = True
    """Queue a step before the one before has ended, as vLLM does on GPUs. Off: wait for
    every step."""

    check_base: bool = True
    """Refuse heads trained on another base model. Switch off to serve a quantised copy
    of the model they were trained on."""

    def __post_init__(self) -> None:
        _check_type(self, "method", str)
        if self.method != "cerberus":
            raise ConfigError(refusal(self.method))
        _check_type(self, "model", str, None)
        _check_type(self, "revision", str, None)
        _check_type(self, "num_speculative_tokens", int, None)
        _check_type(self, "gate", str)
        _check_type(self, "gate_state", str, None)
        _check_type(self, "entropy_threshold", float, int, None)
        _check_type(self, "run_ahead", bool)
        _check_type(self, "check_base", bool)
        _check_draft_tokens(
            self, "at most the number of heads; leave it out to use every head"
        )
        _check_gate(self, GATES)
        if self.model == "" or (self.revision is not None and self.model is None):
            raise ConfigError(
                f"cerberus.model={self.model!r} with revision={self.revision!r} names no "
                "heads: expected a folder or hub id, and a revision only beside a hub id; "
                "leave both out for the model's own folder 'cerberus'."
            )
        if self.entropy_threshold is not None and not self.entropy_threshold > 0:
            raise ConfigError(
                f"cerberus.entropy_threshold={self.entropy_threshold} is out of range: "
                "expected a number of nats above 0; leave it out to use the heads' own."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeConfig(_Settings):
    """Settings of the FREE method (arXiv 2310.05424)."""

    method: str = "free"
    """Always "free"."""

    model: str | None = None
    """Trained exit: a folder or a hub id. None: the folder `free` of the model, and the
    model's own layers, norm and LM head alone where there is no such folder."""

    exit_layer: int | None = None
    """Decoder layers a draft token runs. None: as the trained exit says."""

    num_speculative_tokens: int = 8
    """Most tokens drafted per request and step."""

    mode: str = "verify"
    """"verify": the deep layers correct drafts, and the answer is the model's own.
    "exit", the paper's: a draft is final, for requests that are plainly greedy."""

    gate: str | None = None
    """Who decides whether to draft, and how far: "goodput" by measured cost, "quality"
    with a threshold steered to `exit_quality`, "threshold" while the shallow model is that
    sure, "beta_mixture" with a threshold learnt as in the paper, "always" to the end,
    "never", or the dotted path of a class like those in `vllm_accel.free.gates`. None:
    "goodput", in mode "exit" "quality"."""

    threshold: float | None = None
    """For the gate "threshold", which it chooses where none is: confidence, best
    probability less the second, above which a shallow choice is drafted. The gate
    "quality" begins there. None: what the exit's training measured, 0.9 without."""

    exit_quality: float = 0.99
    """For the gate "quality": share of a request's tokens that all layers should agree
    with. `extra_args={"exit_quality": 0.95}` says it for one request."""

    rollback: float | None = None
    """In mode "exit", nats (-ln p by all layers) above which a draft is taken back, with
    all that follow it. None: never."""

    max_updates: int | None = 300
    """For the gate "beta_mixture": of its threshold, which then stays. None: no end."""

    min_observations: int = 0
    """For the gate "beta_mixture": times that shallow and deep choice agreed, and that
    they did not, before its first update."""

    decay: float = 1.0
    """For the gate "beta_mixture": what is left of an observation's weight after each
    update."""

    run_ahead: bool = True
    """Queue a step before the one before has ended, as vLLM does on GPUs. Off: wait for
    every step."""

    check_base: bool = True
    """Refuse an exit trained on another base model. Switch off to serve a quantised copy
    of the model it was trained on."""

    def __post_init__(self) -> None:
        _check_type(self, "method", str)
        if self.method != "free":
            raise ConfigError(refusal(self.method))
        _check_type(self, "model", str, None)
        _check_type(self, "exit_layer", int, None)
        _check_type(self, "num_speculative_tokens", int)
        _check_type(self, "mode", str)
        _check_type(self, "gate", str, None)
        _check_type(self, "threshold", float, int, None)
        _check_type(self, "exit_quality", float, int)
        _check_type(self, "rollback", float, int, None)
        _check_type(self, "max_updates", int, None)
        _check_type(self, "min_observations", int)
        _check_type(self, "decay", float, int)
        _check_type(self, "run_ahead", bool)
        _check_type(self, "check_base", bool)
        usual = _default(self, "num_speculative_tokens")
        _check_draft_tokens(self, f"what a stack may hold; leave it out for {usual}")
        _check_gate(self, EXIT_GATES)
        if self.mode not in MODES:
            raise ConfigError(
                f"free.mode={self.mode!r} is not a mode: expected {' or '.join(MODES)}; "
                "leave it out for verify."
            )
        if self.mode == "exit" and self.gate == "goodput":
            raise ConfigError(
                "free.gate='goodput' weighs speed alone and free.mode='exit' makes drafts "
                "final: expected another gate; leave it out for quality."
            )
        if self.exit_layer is not None and self.exit_layer < 1:
            raise ConfigError(
                f"free.exit_layer={self.exit_layer} is out of range: expected at least 1 "
                "and less than the model's layers; a quarter of them is a good start."
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"free.threshold={self.threshold} is out of range: expected 0..1; leave it "
                "out to use the exit's own."
            )
        if self.rollback is not None and not self.rollback >= 0:
            raise ConfigError(
                f"free.rollback={self.rollback} is out of range: expected a number of nats "
                "from 0 up; leave it out to take no draft back."
            )
        if not 0 < self.exit_quality < 1:
            raise ConfigError(
                f"free.exit_quality={self.exit_quality} is out of range: expected a share "
                "of tokens above 0 and below 1; mode 'verify' agrees in all of them."
            )
        if (self.max_updates or 0) < 0 or self.min_observations < 0:
            key = "min_observations" if self.min_observations < 0 else "max_updates"
            raise ConfigError(
                f"free.{key}={getattr(self, key)} is out of range: expected a number from "
                "0 up; leave it out to learn as published."
            )
        if not 0 < self.decay <= 1:
            raise ConfigError(
                f"free.decay={self.decay} is out of range: expected a share above 0, at "
                "most 1; leave it out to forget nothing."
            )
        self._check_uses()

    @property
    def gate_in_use(self) -> str:
        """The gate, or what its absence means."""
        if self.gate is not None:
            return self.gate
        if self.threshold is not None:
            return "threshold"
        return "quality" if self.mode == "exit" else "goodput"

    def _check_uses(self) -> None:
        """Refuses what nothing would read."""
        gate, is_final = self.gate_in_use, self.mode == "exit"
        learns = gate == "beta_mixture"
        steers = gate == "quality" or gate not in EXIT_GATES
        for key, fits, expected in (
            ("threshold", gate in ("threshold", "quality"), "gate 'threshold'"),
            ("exit_quality", is_final and steers, "mode 'exit' and gate 'quality'"),
            ("rollback", is_final, "mode 'exit'"),
            ("max_updates", learns, "gate 'beta_mixture'"),
            ("min_observations", learns, "gate 'beta_mixture'"),
            ("decay", learns, "gate 'beta_mixture'"),
        ):
            if getattr(self, key) != _default(self, key) and not fits:
                raise ConfigError(
                    f"free.{key}={getattr(self, key)} has no effect with mode "
                    f"{self.mode!r} and gate {gate!r}: expected {expected}; leave it out."
                )
        if gate == "quality" and not is_final:
            raise ConfigError(
                "free.gate='quality' steers how many final drafts are right, and in mode "
                "'verify' all are corrected: expected mode 'exit'; leave it out."
            )


Config = CerberusConfig | FreeConfig
_CONFIGS: dict[str, type[CerberusConfig] | type[FreeConfig]] = {
    "cerberus": CerberusConfig,
    "free": FreeConfig,
}


def methods_with(key: str) -> tuple[str, ...]:
    """The methods that have a setting of this name."""
    return tuple(
        method
        for method, config in _CONFIGS.items()
        if key in {field.name for field in dataclasses.fields(config)}
    )


def parse(value: object) -> Config:
    """The config behind anything a user may write for `speculative_config`.

    Args:
        value: a bare method name, or a mapping with a "method" key.

    Raises:
        ConfigError: the method does not exist, or its settings are wrong.
    """
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"speculative_config={value!r} is a {type(value).__name__}: expected a "
            "method name or a mapping like {'method': 'cerberus'}."
        )
    if value.get("method") not in METHODS:
        raise ConfigError(refusal(value.get("method")))
    return _CONFIGS[value["method"]].from_mapping(value)


def is_ours(method: object) -> bool:
    """Whether a method name belongs to this plugin."""
    return isinstance(method, str) and method in METHODS + ELSEWHERE


def refusal(method: object) -> str:
    """The sentence for a method that cannot run."""
    if method == "lazyllm":
        return (
            "Speculative method 'lazyllm' drafts nothing and is switched on elsewhere: "
            "expected it in the additional config; use --additional-config "
            "'{\"lazyllm\": {}}'."
        )
    return (
        f"Speculative method {method!r} is not one of vllm_accel's: expected "
        f"{', '.join(METHODS)}; use one of these, or a JSON object for vLLM's own."
    )


def engine_args(method: str = "cerberus", **settings: Any) -> dict[str, Any]:
    """Keyword arguments for `LLM` or `AsyncEngineArgs` that switch a method on.

    >>> LLM(MODEL, **engine_args("cerberus", gate="always"))   # doctest: +SKIP

    Raises:
        ConfigError: the method does not exist, or its settings are wrong.
    """
    checked = parse({"method": method, **settings})
    return {"speculative_config": checked.to_dict()}


def _check_type(config: Any, key: str, *allowed: type | None) -> None:
    value = getattr(config, key)
    types = tuple(t for t in allowed if t is not None)
    is_bool_for_number = isinstance(value, bool) and bool not in types
    if (value is None and None in allowed) or (
        isinstance(value, types) and not is_bool_for_number
    ):
        return
    names = " or ".join("nothing" if t is None else t.__name__ for t in allowed)
    raise ConfigError(
        f"{config.method}.{key}={value!r} is a {type(value).__name__}: expected {names}."
    )


def _default(config: Config, key: str) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return fields[key]


def _check_draft_tokens(config: Config, hint: str) -> None:
    count = config.num_speculative_tokens
    if count is not None and not 1 <= count <= MAX_DRAFT_TOKENS:
        raise ConfigError(
            f"{config.method}.num_speculative_tokens={count} is out of range: expected "
            f"1..{MAX_DRAFT_TOKENS}, {hint}."
        )


def _check_gate(config: Config, built_in: tuple[str, ...]) -> None:
    gate = config.gate
    if gate is None or gate in built_in or "." in gate or ":" in gate:
        return
    raise ConfigError(
        f"{config.method}.gate={gate!r} is not a gate: expected {', '.join(built_in)} or "
        "the dotted path of a gate class."
    )
