"""One prompt: which of its units have come how far, and which matter now.

A unit is what is kept or left out as one: a page, or where `granularity` is "token" a
token. Tokens that are kept one by one are moved together (`paging.count_filling_pages`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_accel.lazyllm.importance import most_important
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import moved_together, num_pages


@dataclass(frozen=True, slots=True)
class Missing:
    """A page that matters in a span whose KV cache it is not in."""

    importance: float
    span: int
    page: int


class PrunedPrompt:
    """Progress of a prompt's units through the spans.

    A unit is in the KV cache of a span or it is not; one in no cache from span `k` on
    waits before span `k`. Generated tokens run everything and are not kept track of.

    Args:
        schedule: of this request.
        num_tokens: of the prompt.
        num_cached_tokens: at its start, taken from the prefix cache: they have run dense.
    """

    def __init__(
        self, schedule: Schedule, num_tokens: int, num_cached_tokens: int = 0
    ) -> None:
        self.schedule = schedule
        self.num_tokens = num_tokens
        units = num_pages(num_tokens, schedule.unit)
        num_spans = len(schedule.spans)
        self.passed = np.zeros(num_tokens, dtype=np.int16)
        """[num_tokens] spans that each token has run, in their order."""
        self.passed[:num_cached_tokens] = num_spans
        self.present = np.zeros((num_spans, units), dtype=np.bool_)
        """[num_spans, num_units] units in the KV cache of a span."""
        cached = num_pages(num_cached_tokens, schedule.unit)
        self.present[:, :cached] = True
        self._moved = np.tile(
            np.arange(num_tokens if schedule.moves else 0), (num_spans, 1)
        )
        """[num_spans, num_tokens] where tokens lie in the KV cache of a span; empty where
        all lie at their positions."""
        self._importance = np.full((num_spans - 1, units), np.nan, dtype=np.float32)
        """[num_spans - 1, num_units] at the end of a span, as the last token saw it."""
        self._always = schedule.always_kept(num_tokens, 0, num_tokens)
        always = int(self._always.sum())
        self._counts = [
            schedule.num_kept(k, 0, num_tokens, always) for k in range(num_spans)
        ]

    @property
    def is_filled(self) -> bool:
        """Whether the whole prompt has been prefilled."""
        return bool(self.passed[-1] == len(self.schedule.spans))

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing anywhere."""
        return bool(self.present[-1].all())

    def units_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] units of the prompt, ascending, that hold any of the tokens."""
        inside = positions[positions < self.num_tokens]
        return np.unique(inside // self.schedule.unit)

    def tokens_of(self, unit: int) -> NDArray[np.int64]:
        """[unit] positions in a full unit."""
        first = unit * self.schedule.unit
        return np.arange(first, first + self.schedule.unit)

    def seen(self, span: int, stop: int) -> NDArray[np.int64]:
        """[n] units below a position that are in the KV cache of a span, ascending."""
        last = num_pages(stop, self.schedule.unit)
        present = self.present[span]
        inside = np.flatnonzero(present[:last])
        return np.concatenate([inside, np.arange(len(present), last)])

    def places(self, span: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] where tokens in the KV cache of a span lie, along the request's pages."""
        if not self.schedule.moves:
            return positions
        inside = positions < self.num_tokens
        return np.concatenate([self._moved[span, positions[inside]], positions[~inside]])

    def pages(self, span: int, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """[k] pages, ascending, that hold units in the KV cache of a span."""
        if not self.schedule.moves:
            return units
        return np.unique(self.places(span, units) // self.schedule.block_size)

    def share_run(self, span: int) -> NDArray[np.float64]:
        """[num_pages] of every page of the prompt, the share of its tokens in a span."""
        size = self.schedule.block_size
        tokens = np.repeat(self.present[span], self.schedule.unit)[: self.num_tokens]
        firsts = np.arange(0, self.num_tokens, size)
        run = np.add.reduceat(tokens, firsts, dtype=np.float64)
        shares: NDArray[np.float64] = run / np.minimum(size, self.num_tokens - firsts)
        return shares

    def start(self, positions: NDArray[np.int64]) -> None:
        """Lets a piece of the prompt into the first span."""
        self.present[0, self.units_of(positions)] = True

    def bring_back(self, span: int, page: int) -> None:
        """Lets a waiting page into the span it waits for."""
        assert not self.present[span, page], f"page {page} is in span {span} already"
        assert self.present[span - 1, page], f"page {page} does not wait for span {span}"
        self.present[span, page] = True

    def run(self, span: int, positions: NDArray[np.int64]) -> None:
        """Counts a span as run by tokens; none runs any span twice or out of turn."""
        inside = positions[positions < self.num_tokens]
        passed = self.passed[inside]
        assert (passed == span).all(), f"tokens {inside} ran {passed} spans, not {span}"
        self.passed[inside] += 1

    def note(
        self,
        span: int,
        units: NDArray[np.int64],  # [n] seen by the last token, ascending
        importance: NDArray[np.float32],  # [n]
    ) -> None:
        """Takes in how much units matter at the end of a span."""
        inside = units < self._importance.shape[1]
        self._importance[span, units[inside]] = importance[inside]

    def prune(
        self,
        span: int,
        running: NDArray[np.int64],  # [n] units of the piece that ran the span before
        piece: tuple[int, int],  # tokens [first, stop) that are prefilled
    ) -> NDArray[np.int64]:
        """[k] those of the running units that run `span` too."""
        first, stop = piece[0], min(piece[1], self.num_tokens)
        always = self.schedule.always_kept(self.num_tokens, first, stop)[running]
        count = self.schedule.num_kept(span, first, stop, int(always.sum()))
        importance = self._importance[span - 1, running]
        assert not np.isnan(importance).any(), f"units {running} were not scored"
        kept = running[most_important(importance, always, count)]
        self.present[span, kept] = True
        if self.schedule.moves:
            size = self.schedule.block_size
            self._moved[span, kept] = moved_together(len(kept), first, stop, size)
        return kept

    def missing(self) -> Iterator[Missing]:
        """Pages that the last token wants and some span has not, shallow spans first.

        The choice starts again from the whole prompt (paper, section 4). A page is judged
        where the last token met it, so one that comes back gets one span deeper a step.
        """
        if not self.is_filled or self.is_whole:
            return
        wanted = np.ones(self.present.shape[1], dtype=np.bool_)
        for span in range(1, len(self.schedule.spans)):
            importance = self._importance[span - 1]
            judged = np.flatnonzero(wanted & ~np.isnan(importance))
            always = self._always[judged]
            chosen = most_important(importance[judged], always, self._counts[span])
            wanted = np.zeros_like(wanted)
            wanted[judged[chosen]] = True
            for page in np.flatnonzero(wanted & ~self.present[span]):
                yield Missing(float(importance[page]), span, int(page))
