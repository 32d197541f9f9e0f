"""One prompt: which of its pages have come how far, and which matter now."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_accel.lazyllm.importance import most_important
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import num_pages


@dataclass(frozen=True, slots=True)
class Missing:
    """A page that matters in a span whose KV cache it is not in."""

    importance: float
    span: int
    page: int


class PrunedPrompt:
    """Progress of a prompt's pages through the spans.

    A page is in the KV cache of a span or it is not; a page in no cache from span `k` on
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
        pages = num_pages(num_tokens, schedule.page_tokens)
        num_spans = len(schedule.spans)
        self.passed = np.zeros(num_tokens, dtype=np.int16)
        """[num_tokens] spans that each token has run, in their order."""
        self.passed[:num_cached_tokens] = num_spans
        self.present = np.zeros((num_spans, pages), dtype=np.bool_)
        """[num_spans, num_pages] pages in the KV cache of a span."""
        cached = num_pages(num_cached_tokens, schedule.page_tokens)
        self.present[:, :cached] = True
        self._importance = np.full((num_spans - 1, pages), np.nan, dtype=np.float32)
        """[num_spans - 1, num_pages] at the end of a span, as the last token saw it."""
        self._always = schedule.always_kept(num_tokens, 0, num_tokens)
        always = int(self._always.sum())
        self._counts = [schedule.num_kept(k, pages, always) for k in range(num_spans)]

    @property
    def is_filled(self) -> bool:
        """Whether the whole prompt has been prefilled."""
        return bool(self.passed[-1] == len(self.schedule.spans))

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing anywhere."""
        return bool(self.present[-1].all())

    def pages_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[num_pages] pages of the prompt, ascending, that hold any of the tokens."""
        inside = positions[positions < self.num_tokens]
        return np.unique(inside // self.schedule.page_tokens)

    def tokens_of(self, page: int) -> NDArray[np.int64]:
        """[page_tokens] positions in a full page."""
        first = page * self.schedule.page_tokens
        return np.arange(first, first + self.schedule.page_tokens)

    def seen(self, span: int, stop: int) -> NDArray[np.int64]:
        """[k] pages below a position that are in the KV cache of a span, ascending."""
        last = num_pages(stop, self.schedule.page_tokens)
        present = self.present[span]
        inside = np.flatnonzero(present[:last])
        return np.concatenate([inside, np.arange(len(present), last)])

    def start(self, positions: NDArray[np.int64]) -> None:
        """Lets a piece of the prompt into the first span."""
        self.present[0, self.pages_of(positions)] = True

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
        pages: NDArray[np.int64],  # [k] seen by the last token, ascending
        importance: NDArray[np.float32],  # [k]
    ) -> None:
        """Takes in how much pages matter at the end of a span."""
        inside = pages < self._importance.shape[1]
        self._importance[span, pages[inside]] = importance[inside]

    def prune(
        self,
        span: int,
        running: NDArray[np.int64],  # [k] pages of the piece that ran the span before
        piece: tuple[int, int],  # tokens [first, stop) that are prefilled
    ) -> NDArray[np.int64]:
        """[n] those of the running pages that run `span` too."""
        first, stop = piece[0], min(piece[1], self.num_tokens)
        always = self.schedule.always_kept(self.num_tokens, first, stop)[running]
        size = self.schedule.page_tokens
        in_piece = num_pages(stop, size) - first // size
        count = self.schedule.num_kept(span, in_piece, int(always.sum()))
        importance = self._importance[span - 1, running]
        assert not np.isnan(importance).any(), f"pages {running} were not scored"
        chosen = most_important(importance, always, count)
        kept = running[chosen]
        self.present[span, kept] = True
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
