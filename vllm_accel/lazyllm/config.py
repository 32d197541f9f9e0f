"""What a user may set for LazyLLM, frozen and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from vllm_accel.errors import ConfigError, refuse_unknown_keys

GRANULARITIES = ("page", "token")
CHOICES = ("attention", "random")
POOLINGS = ("mean", "max")
REVIVALS = ("budget", "off")

_KEEP = {"token": 0.03, "page": 0.1}
"""By granularity, `keep` unless it is given: measured, docs/LOG.md."""

Keep = float | tuple[float, ...]
"""The share of a prompt, beside what always stays, that runs the last layers; or the share
after every point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyConfig:
    """Settings of the LazyLLM method."""

    prune_after: tuple[int, ...] | None = None
    """Layers run before each pruning point, ascending. None: a third and two thirds of
    the depth, as near as whole KV-cache groups allow."""

    keep: Keep | None = None
    """Share of the prompt, sink and window apart, above 0 and at most 1, that is left after
    the last pruning point, and more after those before (see `schedule.shares`); or the
    share left after each. 1 prunes nothing. None: 0.03 of single tokens, 0.1 of pages."""

    progressive: bool = True
    """Whether one `keep` is reached step by step over all points. False: at the first, as
    the paper's static pruning has it."""

    choose: str = "attention"
    """What says who matters: "attention" of the last token, or "random" numbers from a
    fixed seed, the paper's random drop: only good to compare with."""

    observe: int = 8
    """Last tokens of a prompt whose attention counts, all alike. The paper has 1."""

    look_ahead: bool = True
    """Whether a prefill asks the attention of the layer to come who runs it, a layer
    sooner than the paper, which asks the layer just run. Decoding asks the layer just
    run: in the one to come it has no keys of those it could bring back."""

    granularity: str = "token"
    """What is kept or pruned as one: as in the paper a "token", or a KV-cache "page", of
    which less can be left out, and which can come back."""

    pooling: str = "mean"
    """A page's importance from its tokens': "mean" or "max"."""

    spread: int = 16
    """Tokens on either side that count as much as the one between them, if that is looked
    at more. The paper has 0, and brings back what it misses in every step."""

    min_prompt: int = 1024
    """Tokens below which a prompt is left alone."""

    max_whole_prompt: int = 8192
    """Tokens up to which a prompt is prefilled in one piece; longer ones are pruned piece
    by piece, each by its own last token."""

    sink: int = 16
    """Tokens at the start of the prompt always kept; with pages, all of theirs are."""

    recent: int = 64
    """Tokens at the end of the prompt always kept; with pages, all of theirs are."""

    revive: str | None = None
    """Whether decoding brings back what it finds to matter: "budget" or "off". None:
    "budget" for pages, "off" for tokens."""

    revive_every: int = 8
    """Decoding steps from one choice of a request's pages to its next. The paper chooses
    in every step, and what it brings back costs as much as it would have in the prefill."""

    revive_pages: int = 4
    """Most pages brought back in one step, of all requests and spans together."""

    def __post_init__(self) -> None:
        for key in ("prune_after", "keep"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        _check_points(self.prune_after)
        if self.keep is not None:
            _check_keep(self.keep, self.prune_after)
        _check_choice("choose", self.choose, CHOICES)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("pooling", self.pooling, POOLINGS)
        if self.revive is not None:
            _check_choice("revive", self.revive, REVIVALS)
        for key in ("progressive", "look_ahead"):
            _check_bool(key, getattr(self, key))
        for key, least in _LEAST.items():
            _check_number(key, getattr(self, key), least)
        if self.granularity == "token" and self.revive == "budget":
            raise ConfigError(
                "lazyllm.revive='budget' with granularity='token' cannot run: attention "
                "kernels read whole pages, so expected 'off' for tokens; take "
                "granularity='page' to revive."
            )

    @property
    def kept(self) -> Keep:
        """`keep`, or what None means."""
        return _KEEP[self.granularity] if self.keep is None else self.keep

    @property
    def revives(self) -> bool:
        """Whether pruned tokens are parked and can come back."""
        if self.revive is None:
            return self.granularity == "page"
        return self.revive == "budget"

    @classmethod
    def from_mapping(cls, settings: object) -> "LazyConfig":
        """The config a JSON object describes.

        Raises:
            ConfigError: it is none, a key is unknown or a value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        return cls(**_checked_keys("lazyllm", settings, known))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_mapping` gives the same config back."""
        return dataclasses.asdict(self)


_LEAST = {
    "min_prompt": 1,
    "max_whole_prompt": 1,
    "sink": 0,
    "recent": 1,
    "observe": 1,
    "spread": 0,
    "revive_every": 1,
    "revive_pages": 1,
}


def requested_keep(extra_args: Mapping[str, Any] | None, num_points: int) -> Keep | None:
    """What a request asks for in `SamplingParams.extra_args`; None if nothing.

    Both `{"lazyllm": {"keep": 0.5}}` and `{"lazyllm": 0.5}` are taken: `vllm_xargs` over
    HTTP carries numbers and lists of them, no objects. `false`, which arrives as 0 there,
    prunes nothing.

    Raises:
        ConfigError: not a share, or something else than `keep` is asked for.
    """
    asked = (extra_args or {}).get("lazyllm")
    if isinstance(asked, Mapping):
        asked = _checked_keys("extra_args['lazyllm']", asked, ["keep"]).get("keep")
    if asked is None:
        return None
    if isinstance(asked, int) and asked == 0:
        return 1.0
    keep = tuple(asked) if isinstance(asked, list) else asked
    _check_keep(keep, range(num_points))
    return keep


def _checked_keys(name: str, settings: object, known: list[str]) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{name}={settings!r:.80} is a {type(settings).__name__}: expected a mapping "
            f"with keys of {', '.join(known)}; {{}} takes every default."
        )
    refuse_unknown_keys(settings, known, f"in {name}")
    return dict(settings)


def _is_number(value: object, *types: type) -> TypeGuard[float]:
    return isinstance(value, types) and not isinstance(value, bool)


def _check_number(key: str, value: object, least: int) -> None:
    if not _is_number(value, int) or value < least:
        raise ConfigError(
            f"lazyllm.{key}={value!r} is not allowed: expected a whole number from {least} "
            "up; leave it out for the default."
        )


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(
            f"lazyllm.{key}={value!r} is not allowed: expected true or false; leave it out "
            "for the default."
        )


def _check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"lazyllm.{key}={value!r} is not allowed: expected {' or '.join(allowed)}; "
            "leave it out for the default."
        )


def _check_points(points: object) -> None:
    if points is None:
        return
    if not (
        isinstance(points, tuple)
        and points
        and all(_is_number(point, int) and point > 0 for point in points)
        and all(before < after for before, after in pairwise(points))
    ):
        raise ConfigError(
            f"lazyllm.prune_after={points!r} is not in order: expected one or more layer "
            "counts above 0, each larger than the one before; leave it out to have them "
            "chosen from the depth."
        )


def _check_keep(keep: object, points: Sequence[int] | None) -> None:
    shares = keep if isinstance(keep, tuple) else (keep,)
    if not (
        shares
        and all(_is_number(share, int, float) and 0 < share <= 1 for share in shares)
        and all(before >= after for before, after in pairwise(shares))
    ):
        raise ConfigError(
            f"lazyllm.keep={keep!r} is out of range: expected a share above 0 and at most "
            "1, or one per pruning point, none larger than the one before; take 1 to prune "
            "nothing."
        )
    if isinstance(keep, tuple) and len(keep) != (None if points is None else len(points)):
        raise ConfigError(
            f"lazyllm.keep={keep!r} has {len(keep)} shares: expected one per pruning point "
            f"of prune_after={points and tuple(points)!r}; give both, or one number."
        )
