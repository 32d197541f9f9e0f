"""What runs in a step: rows of requests on their way through the spans, and pages back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_accel.lazyllm.prompt import PrunedPrompt
from vllm_accel.paging import num_pages
from vllm_accel.spans import Lane


@dataclass(slots=True)
class Flow:
    """The rows of one request that are still on their way through the step."""

    req_id: str
    prompt: PrunedPrompt | None
    piece: tuple[int, int]
    positions: NDArray[np.int64]

    @property
    def prefills(self) -> bool:
        """Whether the step runs part of a prompt that is pruned."""
        return self.prompt is not None and self.piece[0] < self.prompt.num_tokens

    @property
    def may_revive(self) -> bool:
        """Whether it decodes and misses pages of its prompt."""
        return self.prompt is not None and not self.prefills and not self.prompt.is_whole

    def units(self, span: int) -> NDArray[np.int64]:
        """[n] of a pruned prompt, and of what was generated, that the last row sees."""
        assert self.prompt is not None
        return self.prompt.seen(span, self.piece[1])

    def units_ahead(self, span: int) -> NDArray[np.int64]:
        """As they would be after `span`, were none of its rows pruned before."""
        assert self.prompt is not None
        return np.union1d(self.units(span + 1), self.prompt.units_of(self.positions))

    def lane(self, span: int, block_size: int) -> Lane:
        """Its rows in a span, and the pages they see."""
        if self.prompt is None:
            return self._lane(np.arange(num_pages(self.piece[1], block_size)), block_size)
        pages = self.prompt.pages(span, self.units(span))
        return self._lane(pages, block_size, self.prompt.places(span, self.positions))

    def lane_ahead(self, span: int, block_size: int) -> Lane:
        """In the span after `span`, its rows where they lie before it prunes."""
        if self.prompt is None:
            return self.lane(span, block_size)
        running = self.prompt.pages(span, self.prompt.units_of(self.positions))
        before = self.prompt.pages(span + 1, self.units(span + 1))
        places = self.prompt.places(span, self.positions)
        return self._lane(np.union1d(before, running), block_size, places)

    def _lane(
        self,
        pages: NDArray[np.int64],
        block_size: int,
        places: NDArray[np.int64] | None = None,
    ) -> Lane:
        stop = self.piece[1]
        last = num_pages(stop, block_size) - 1
        assert pages[-1] == last, f"{self.req_id} lost the page of its last token"
        seq_len = (len(pages) - 1) * block_size + stop - last * block_size
        return Lane(self.req_id, self.positions, pages, seq_len, places)


@dataclass(frozen=True, slots=True)
class Revival:
    """A page that runs one span in this step, as a lane of its own."""

    req_id: str
    prompt: PrunedPrompt
    span: int
    page: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """[page_tokens] of its tokens."""
        return self.prompt.tokens_of(self.page)

    def lane(self) -> Lane:
        """Its rows, and the pages up to itself."""
        pages = self.prompt.seen(self.span, int(self.positions[-1]) + 1)
        return Lane(self.req_id, self.positions, pages, len(pages) * len(self.positions))
