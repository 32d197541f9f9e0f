"""How much of a prompt runs which layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError
from vllm_accel.lazyllm.config import Keep, LazyConfig
from vllm_accel.paging import count_filling_pages, num_pages
from vllm_accel.spans import (
    MOST_PADDING_RATIO,
    Span,
    check_padding,
    group_size,
    padding_ratio,
    spans_between,
)

_ROUNDING = 1e-9  # 0.07 * 100 is a little more than 7, and not 8 pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Spans, and the share of a prompt's units that each runs: of its pages, or tokens."""

    spans: tuple[Span, ...]
    keep: tuple[float, ...]
    """Per span; the first runs everything. Never rises."""
    progressive: bool
    """Whether a request's own `keep` is reached step by step."""
    unit: int
    """Tokens kept or pruned as one."""
    block_size: int
    """Tokens in a KV-cache page."""
    sink: int
    """Tokens at the start that are always kept."""
    recent: int
    """Tokens at the end that are always kept."""
    min_prompt: int
    """Tokens below which a prompt is left alone."""
    observe: int
    """Last tokens of a prompt whose attention counts."""
    look_ahead: bool
    """Whether a prefill asks the first layer of the span to come who runs it."""

    @classmethod
    def of(cls, config: LazyConfig, *, num_layers: int, block_size: int) -> "Schedule":
        """The schedule a config means for a model.

        Args:
            num_layers: decoder layers.
            block_size: tokens in a KV-cache page.

        Raises:
            ConfigError: a pruning point is not inside the model, or the spans' lengths
                waste KV memory.
        """
        points = config.prune_after or default_points(num_layers)
        if points[-1] >= num_layers:
            raise ConfigError(
                f"lazyllm.prune_after={points!r} is not inside the model: expected layer "
                f"counts from 1 to {num_layers - 1} (it has {num_layers} layers); leave it "
                "out to have them chosen from the depth."
            )
        spans = spans_between(points, num_layers)
        check_padding(spans)
        return cls(
            spans=spans,
            keep=shares(config.kept, len(points), config.progressive),
            progressive=config.progressive,
            unit=block_size if config.granularity == "page" else 1,
            block_size=block_size,
            sink=config.sink,
            recent=config.recent,
            min_prompt=config.min_prompt,
            observe=config.observe,
            look_ahead=config.look_ahead,
        )

    def with_keep(self, keep: Keep) -> "Schedule":
        """The schedule of a request that asks for other shares."""
        points = len(self.spans) - 1
        return replace(self, keep=shares(keep, points, self.progressive))

    @property
    def moves(self) -> bool:
        """Whether tokens that are kept are moved together, to fill pages."""
        return self.unit < self.block_size

    def prunes(self, num_tokens: int) -> bool:
        """Whether a prompt may be pruned, as far as admission can tell.

        Scheduler and workers ask this alike: such a request publishes no page of a span
        after the first, those of its generated tokens included.
        """
        return num_tokens >= self.min_prompt and self.keep[-1] < 1

    def num_kept(self, span: int, first: int, stop: int, always: int) -> int:
        """Units of the piece [first, stop) that run a span.

        Those that are never pruned, and the share of the others; of single tokens as many
        as leave no page half empty.

        Args:
            always: units of the piece that are never pruned.
        """
        others = num_pages(stop, self.unit) - first // self.unit - always
        count = always + math.ceil(self.keep[span] * others - _ROUNDING)
        if not self.moves:
            return count
        return count_filling_pages(count, first, stop, self.block_size)

    def always_kept(self, num_tokens: int, first: int, stop: int) -> NDArray[np.bool_]:
        """[num_units] units that are never pruned while `[first, stop)` is prefilled.

        Beside sink and window: those of the last tokens, by whose attention the others are
        judged, and a page whose first tokens came with the piece before.

        Args:
            num_tokens: of the prompt.
            first: token of the piece.
            stop: end of the piece, at most `num_tokens`.
        """
        units = np.arange(num_pages(num_tokens, self.unit))
        always = units < num_pages(self.sink, self.unit)
        always |= units >= max(num_tokens - self.recent, 0) // self.unit
        judge = max(stop - self.observe, first)
        always |= (units >= judge // self.unit) & (units <= (stop - 1) // self.unit)
        if first % self.unit:
            always |= units == first // self.unit
        return always

    def most_parked(self, num_tokens: int) -> int:
        """Tokens of a prompt that can wait in the Aux Cache at once."""
        units = num_pages(num_tokens, self.unit)
        return (units - self.num_kept(-1, 0, num_tokens, 1)) * self.unit

    def layers_ratio(self) -> float:
        """Rows times layers of a long prompt's prefill, over a dense one's."""
        run = sum(
            len(span) * keep for span, keep in zip(self.spans, self.keep, strict=True)
        )
        return run / self.spans[-1].stop

    def pages_ratio(self, num_tokens: int, aux_rows: float) -> float:
        """Block ids a pruned prompt holds when prefilled, Aux included, over a dense one.

        Args:
            num_tokens: of the prompt.
            aux_rows: parked tokens that one block holds; infinite without an Aux Cache.
        """
        always = int(self.always_kept(num_tokens, 0, num_tokens).sum())
        groups = [num_pages(len(span), group_size(self.spans)) for span in self.spans]
        kept = [
            num_pages(self.num_kept(k, 0, num_tokens, always) * self.unit, self.block_size)
            for k in range(len(self.spans))
        ]
        held = sum(n * count for n, count in zip(groups, kept, strict=True))
        held += math.ceil(self.most_parked(num_tokens) / aux_rows)
        return held / (sum(groups) * num_pages(num_tokens, self.block_size))


def shares(keep: Keep, num_points: int, progressive: bool = True) -> tuple[float, ...]:
    """The share that runs each span; one number is reached step by step, or at once.

    Step by step, early points prune more than equal factors would: 0.2 and 0.1 were
    not told apart from 0.32 and 0.1 by their answers, and sooner (docs/LOG.md).
    """
    if isinstance(keep, tuple):
        return (1.0, *keep)
    if not progressive:
        return (1.0, *[keep] * num_points)
    return tuple(keep ** math.sqrt(k / num_points) for k in range(num_points + 1))


def default_points(num_layers: int) -> tuple[int, ...]:
    """Two pruning points: spans of a third each.

    Early ones save more and know less (paper, figure 6): measured on the reference model,
    see docs/decisions/0010. Lengths are moved to where groups of layers waste little
    memory.

    Raises:
        ConfigError: there is no layer between two spans.
    """
    if num_layers < 3:
        raise ConfigError(
            f"lazyllm needs a model of at least 3 layers: got {num_layers}, expected more; "
            "serve it without lazyllm."
        )
    lengths = sorted(
        range(1, (num_layers - 1) // 2 + 1), key=lambda n: (abs(n - num_layers / 3), n)
    )
    return next(points for n in lengths if _wastes_little(points := (n, 2 * n), num_layers))


def _wastes_little(points: Sequence[int], num_layers: int) -> bool:
    return padding_ratio(spans_between(points, num_layers)) <= MOST_PADDING_RATIO
