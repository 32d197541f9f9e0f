"""Pages of KV cache: slot arithmetic, and giving pages of a live request back and forth.

A request has one row of block ids per KV-cache group; entry `p` holds the tokens
`[p * block_size, (p + 1) * block_size)`, and `NULL_BLOCK` stands where there is no page.
vLLM's rows only grow. Here a worker may null an entry, and a scheduler may fill it again:

1. the worker nulls entries, and says with its step's output what it dropped and what it
   wants (`PageReport`);
2. the scheduler returns dropped blocks to the pool, and sends blocks for the wanted pages
   with the next step it schedules, or declines (`PageAnswer`).

Steps may be scheduled before the output of earlier ones is in, as long as workers run them
in order: a page is freed only after no later step can read it, a new one is written by the
step that brings it, and a report from before a preemption is known by its step number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NULL_BLOCK = 0
"""vllm/v1/attention/backends/utils.py:NULL_BLOCK_ID (0.32)."""

Groups = Sequence[Sequence[int]]
"""Per span, the KV-cache groups its layers are in; a page of a span is one of each."""

Wanted = tuple[str, int, int]
"""(req_id, span, page)"""


def num_pages(num_tokens: int, block_size: int) -> int:
    """Pages that hold a number of tokens."""
    return -(-num_tokens // block_size)


def slots(
    row: Sequence[int],
    places: NDArray[np.int64],  # [num_tokens]
    block_size: int,
) -> NDArray[np.int64]:
    """[num_tokens] where a request's tokens lie in the cache.

    Args:
        row: block ids of the request in one group.
        places: of the tokens, counted along the row; all in pages that are there.
        block_size: tokens in a page.
    """
    pages, offsets = np.divmod(places, block_size)
    blocks = np.asarray(row, dtype=np.int64)[pages]
    assert (blocks != NULL_BLOCK).all(), f"tokens at {places} in a null page of {row}"
    result: NDArray[np.int64] = blocks * block_size + offsets
    return result


def without_nulls(
    block_table: Tensor,  # [num_reqs, width] int32
    seq_lens: Tensor,  # [num_reqs] int32
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """A block table and lengths as an attention kernel is to see them: null pages left out.

    A null page is a full one, because the last page of a request is never dropped.

    Returns:
        [num_reqs, width] int32 with the pages moved together, [num_reqs] int32.
    """
    columns = torch.arange(block_table.shape[1], device=block_table.device)
    used = columns < -(-seq_lens[:, None] // block_size)
    there = used & (block_table != NULL_BLOCK)
    order = there.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    table = block_table.masked_fill(~there, NULL_BLOCK).gather(1, order)
    missing = (used & ~there).sum(dim=1).to(seq_lens.dtype)
    return table, seq_lens - missing * block_size


def count_filling_pages(count: int, first: int, stop: int, block_size: int) -> int:
    """The least number of tokens, at least `count`, that leave no page half empty.

    Of tokens [first, stop) some are kept and moved together: into what is free of the page
    of `first`, the others into the last slots before `stop`. What lies between are whole
    pages, which can be given back; the last page stays, and tokens to come lie where they
    would have.

    Args:
        count: tokens to keep, at most `stop - first`.
        block_size: tokens in a page.
    """
    head = min(-first % block_size, stop - first)
    pages = num_pages(stop - first - head, block_size)
    end = stop - first - head - (pages - 1) * block_size if pages else 0
    more = max(count - head - end, 0)
    return head + end + num_pages(more, block_size) * block_size


def moved_together(count: int, first: int, stop: int, block_size: int) -> NDArray[np.int64]:
    """[count] the places of so many tokens, see `count_filling_pages`, ascending."""
    head = min(-first % block_size, stop - first)
    return np.concatenate(
        [np.arange(first, first + head), np.arange(stop - count + head, stop)]
    )


@dataclass(frozen=True, slots=True)
class PageChange:
    """What a worker did and asks for in one span of one request."""

    dropped: tuple[int, ...] = ()
    """Pages nulled in this step; their blocks may be given away."""
    wanted: tuple[int, ...] = ()
    """Null pages to be brought back."""


@dataclass(frozen=True, slots=True)
class PageReport:
    """From worker to scheduler, with a step's output."""

    step: int
    """Number of the answer that came with the step."""
    changes: Mapping[str, Mapping[int, PageChange]] = field(default_factory=dict)
    """{req_id: {span: change}}"""


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """From scheduler to workers, with a step."""

    step: int
    """Counts the scheduled steps."""
    granted: Mapping[str, Mapping[int, Mapping[int, tuple[int, ...]]]] = field(
        default_factory=dict
    )
    """{req_id: {span: {page: block id per group of the span}}}"""
    declined: tuple[Wanted, ...] = ()


class BlockBooks(Protocol):
    """Who owns which block: vLLM's own managers and pool, seen through four questions."""

    def num_free(self) -> int:
        """Blocks the pool could hand out now."""
        ...

    def block_at(self, req_id: str, group: int, page: int) -> int:
        """Block id of a page."""
        ...

    def give_back(self, req_id: str, group: int, page: int) -> None:
        """Nulls a page and returns its block to the pool."""
        ...

    def take(self, req_id: str, group: int, page: int) -> int:
        """Puts a block of the pool where a null page is; gives its id."""
        ...


class PageLedger:
    """The scheduler's side.

    Args:
        books: where blocks are owned.
        groups: per span, its KV-cache groups.
    """

    def __init__(self, books: BlockBooks, groups: Groups) -> None:
        self._books = books
        self._groups = groups
        self._since: dict[str, int] = {}
        self._wanted: dict[str, list[tuple[int, int]]] = {}
        self._step = 0
        self.pages_given_back = 0
        self.pages_granted = 0
        self.pages_declined = 0

    def free(self, req_id: str) -> None:
        """Forgets a request whose blocks all go: finished, aborted or preempted."""
        self._since.pop(req_id, None)
        self._wanted.pop(req_id, None)

    def settle(self, report: PageReport) -> None:
        """Takes in what a worker reports; what is of a request's former life is void."""
        for req_id, changes in report.changes.items():
            if report.step < self._since.get(req_id, report.step + 1):
                continue
            for span, change in changes.items():
                self._give_back(req_id, span, change.dropped)
                wanted = self._wanted.setdefault(req_id, [])
                wanted += [(span, page) for page in change.wanted]

    def answer(
        self, started: Iterable[str], scheduled: Iterable[str], reserve: int
    ) -> PageAnswer:
        """What goes out with a step that is scheduled, to be asked after all else is.

        Wants of requests the step leaves out wait for one that has them.

        Args:
            started: requests new in this step, or resumed.
            scheduled: every request of the step.
            reserve: free blocks to leave, so that no revival makes the next step preempt.
        """
        self._step += 1
        self._since.update(dict.fromkeys(started, self._step))
        granted: dict[str, dict[int, dict[int, tuple[int, ...]]]] = {}
        declined: list[Wanted] = []
        for req_id in scheduled:
            for span, page in self._wanted.pop(req_id, ()):
                blocks = self._take(req_id, span, page, reserve)
                if blocks:
                    granted.setdefault(req_id, {}).setdefault(span, {})[page] = blocks
                else:
                    declined.append((req_id, span, page))
        self.pages_declined += len(declined)
        return PageAnswer(self._step, granted, tuple(declined))

    def _give_back(self, req_id: str, span: int, pages: Sequence[int]) -> None:
        for page in pages:
            for group in self._groups[span]:
                self._books.give_back(req_id, group, page)
        self.pages_given_back += len(pages)

    def _take(self, req_id: str, span: int, page: int, reserve: int) -> tuple[int, ...]:
        groups = self._groups[span]
        if self._books.num_free() - len(groups) < reserve:
            return ()
        self.pages_granted += 1
        return tuple(self._books.take(req_id, group, page) for group in groups)


@dataclass(frozen=True, slots=True)
class Cell:
    """An entry of a row that changed, for the copy a batch keeps of it."""

    req_id: str
    group: int
    page: int
    block_id: int


class WorkerPages:
    """A worker's side: the rows it reads, and which of their entries it nulled.

    Rows are the engine's own lists; it appends to them, this fills and nulls.

    Args:
        groups: per span, its KV-cache groups.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._rows: dict[str, Sequence[list[int]]] = {}
        self._asked: set[Wanted] = set()
        self._dropped: dict[str, dict[int, list[int]]] = {}
        self._wanted: dict[str, dict[int, list[int]]] = {}
        self._step = 0

    @property
    def asked(self) -> frozenset[Wanted]:
        """Pages asked for and not answered."""
        return frozenset(self._asked)

    def start(self, req_id: str, rows: Sequence[list[int]]) -> None:
        """Takes the rows, one per group, of a request that is new or resumed."""
        self.forget(req_id)
        self._rows[req_id] = rows

    def forget(self, req_id: str) -> None:
        """Drops all there is about a request: finished, aborted or preempted."""
        self._rows.pop(req_id, None)
        self._dropped.pop(req_id, None)
        self._wanted.pop(req_id, None)
        self._asked = {wanted for wanted in self._asked if wanted[0] != req_id}

    def row(self, req_id: str, span: int) -> list[int]:
        """Block ids of a request in a span's first group; all have the same nulls."""
        return self._rows[req_id][self._groups[span][0]]

    def take(self, answer: PageAnswer) -> list[Cell]:
        """Fills what was granted; the step at hand must write these pages."""
        self._step = answer.step
        self._asked.difference_update(answer.declined)
        return [
            cell
            for req_id, spans in answer.granted.items()
            for span, pages in spans.items()
            for page, blocks in pages.items()
            for cell in self._fill(req_id, span, page, blocks)
        ]

    def drop(self, req_id: str, span: int, pages: Iterable[int]) -> list[Cell]:
        """Nulls pages that nothing reads or writes from here on."""
        gone = self._dropped.setdefault(req_id, {}).setdefault(span, [])
        cells = []
        for page in pages:
            gone.append(page)
            cells += [self._null(req_id, group, page) for group in self._groups[span]]
        return cells

    def want(self, req_id: str, span: int, page: int) -> None:
        """Asks for a null page, once until it is answered."""
        assert self.row(req_id, span)[page] == NULL_BLOCK, f"{req_id} has page {page}"
        assert (req_id, span, page) not in self._asked, f"{req_id} asks twice for {page}"
        self._asked.add((req_id, span, page))
        self._wanted.setdefault(req_id, {}).setdefault(span, []).append(page)

    def report(self) -> PageReport:
        """What goes out with the output of the step at hand; the next starts afresh."""
        changes: dict[str, dict[int, PageChange]] = {}
        for req_id in [*self._dropped, *self._wanted]:
            dropped, wanted = self._dropped.get(req_id, {}), self._wanted.get(req_id, {})
            changes[req_id] = {
                span: PageChange(tuple(dropped.get(span, ())), tuple(wanted.get(span, ())))
                for span in sorted({*dropped, *wanted})
            }
        self._dropped, self._wanted = {}, {}
        return PageReport(self._step, changes)

    def _fill(
        self, req_id: str, span: int, page: int, blocks: Sequence[int]
    ) -> Iterable[Cell]:
        self._asked.remove((req_id, span, page))
        for group, block_id in zip(self._groups[span], blocks, strict=True):
            row = self._rows[req_id][group]
            assert row[page] == NULL_BLOCK, f"{req_id} already has page {page}: {row}"
            row[page] = block_id
            yield Cell(req_id, group, page, block_id)

    def _null(self, req_id: str, group: int, page: int) -> Cell:
        row = self._rows[req_id][group]
        assert row[page] != NULL_BLOCK, f"{req_id} drops page {page} twice: {row}"
        row[page] = NULL_BLOCK
        return Cell(req_id, group, page, NULL_BLOCK)
