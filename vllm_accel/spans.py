"""The span primitive: run decoder layers `[first, stop)` on chosen token rows.

A row keeps the position it was born with; its keys and values go to a chosen slot, and it
reads the slots its `View` names. Run in one span or in several, on all rows, a step is the
same step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_accel.errors import ConfigError
from vllm_accel.paging import NULL_BLOCK, num_pages, slots

MOST_PADDING_RATIO = 0.10
"""KV memory that spans of unequal length may waste, as a share of what layers use."""


@dataclass(frozen=True, slots=True)
class Span:
    """Decoder layers `[first, stop)`."""

    first: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.stop, f"no layers in [{self.first}, {self.stop})"

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def last(self) -> int:
        """The layer rows come out of."""
        return self.stop - 1

    def split(self, at: int) -> tuple["Span", "Span"]:
        """The span as two; running both is running it."""
        return Span(self.first, at), Span(at, self.stop)


def spans_between(points: Sequence[int], num_layers: int) -> tuple[Span, ...]:
    """Spans that cover all layers, cut after `points[i]` layers; points ascend."""
    return tuple(Span(*edges) for edges in pairwise([0, *points, num_layers]))


def group_size(spans: Sequence[Span]) -> int:
    """Layers in every KV-cache group that vLLM makes of spans it may not mix.

    vllm/v1/core/kv_cache_utils.py:_get_kv_cache_groups_uniform_page_size (0.32).
    """
    shortest, longest = min(map(len, spans)), max(map(len, spans))
    return longest if longest < 1.5 * shortest else shortest


def group_layers(spans: Sequence[Span]) -> tuple[tuple[range, ...], ...]:
    """Per span, the layers of each of its groups; vLLM interleaves those of a long one."""
    size = group_size(spans)
    counts = [num_pages(len(span), size) for span in spans]
    return tuple(
        tuple(range(span.first + i, span.stop, count) for i in range(count))
        for span, count in zip(spans, counts, strict=True)
    )


def padding_ratio(spans: Sequence[Span]) -> float:
    """KV memory wasted because groups are filled up to one size, per memory in use."""
    size = group_size(spans)
    return sum(-len(span) % size for span in spans) / sum(map(len, spans))


def check_padding(spans: Sequence[Span]) -> None:
    """Refuses spans whose lengths waste memory.

    Raises:
        ConfigError: more than `MOST_PADDING_RATIO` would be padding.
    """
    ratio = padding_ratio(spans)
    if ratio > MOST_PADDING_RATIO:
        lengths = ", ".join(str(len(span)) for span in spans)
        raise ConfigError(
            f"Spans of {lengths} layers waste {100 * ratio:.0f} % of the KV cache: "
            f"expected at most {100 * MOST_PADDING_RATIO:.0f} %; make every span a "
            "multiple of the shortest."
        )


@dataclass(frozen=True, slots=True)
class Stream:
    """Token rows between two layers."""

    hidden: Tensor  # [num_tokens, hidden_size] hidden states, residual summed
    positions: Tensor  # [num_tokens] int64, in their sequence

    def __len__(self) -> int:
        return int(self.positions.shape[0])

    def take(self, rows: Tensor) -> "Stream":
        """Some of the rows: [k] int64, in the order given."""
        return Stream(self.hidden[rows], self.positions[rows])

    def put(self, rows: Tensor, part: "Stream") -> "Stream":
        """The stream with what `take(rows)` gave put back, its hidden states changed."""
        assert torch.equal(self.positions[rows], part.positions), "positions moved"
        return Stream(self.hidden.index_copy(0, rows, part.hidden), self.positions)


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows of one request that attend together: one sequence of a batch.

    The rows are the last tokens of what the lane sees, so a kernel's causal mask, which
    aligns the last row with the last token, is exact. A page brought back to the middle
    of a prompt is a lane of its own, which sees nothing after itself.
    """

    req_id: str
    positions: NDArray[np.int64]  # [num_rows] ascending
    pages: NDArray[np.int64]  # [num_pages] pages seen, ascending; all but the last full
    seq_len: int
    """Tokens seen, own rows included."""
    moved: NDArray[np.int64] | None = None  # [num_rows]
    """Where the rows lie, counted along the request's pages; None: at their positions."""

    @property
    def places(self) -> NDArray[np.int64]:
        """[num_rows] where the rows lie, counted along the request's pages."""
        return self.positions if self.moved is None else self.moved

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class View:
    """Where the rows of a span write and what they read, in the words of vLLM's kernels.

    Fields as in vllm/v1/attention/backend.py:CommonAttentionMetadata (0.32).
    """

    query_start_loc: Tensor  # [num_lanes + 1] int32
    seq_lens: Tensor  # [num_lanes] int32
    block_table: Tensor  # [num_lanes, width] int32
    slot_mapping: Tensor  # [num_tokens] int64


Rows = Callable[[str], Sequence[int]]
"""Block ids of a request, nulls included, in the group at hand."""


def view_of(lanes: Sequence[Lane], rows: Rows, block_size: int) -> View:
    """The view of lanes: pages they see, slots they write to."""
    return _view(
        lanes,
        [np.asarray(rows(lane.req_id))[lane.pages] for lane in lanes],
        [slots(rows(lane.req_id), lane.places, block_size) for lane in lanes],
    )


def _view(
    lanes: Sequence[Lane],
    tables: Sequence[NDArray[np.int64]],
    places: Sequence[NDArray[np.int64]],
) -> View:
    block_table = np.full((len(lanes), max(map(len, tables))), NULL_BLOCK, dtype=np.int32)
    for i, table in enumerate(tables):
        block_table[i, : len(table)] = table
    starts = np.cumsum([0, *map(len, lanes)])
    return View(
        torch.from_numpy(starts.astype(np.int32)),
        torch.tensor([lane.seq_len for lane in lanes], dtype=torch.int32),
        torch.from_numpy(block_table),
        torch.from_numpy(np.concatenate(places)),
    )


def table_view(
    block_table: NDArray[np.int32],  # [num_lanes, width]
    lens: NDArray[np.int64],  # [num_lanes] rows, at least one each
    positions: NDArray[np.int64],  # [num_tokens] a lane's rows together, ascending
    block_size: int,
) -> View:
    """The view of lanes that see all pages before their last row, at one go.

    What `view_of` gives lane by lane; a decoding step has no time for that.
    """
    starts = np.concatenate([[0], np.cumsum(lens)])
    pages, offsets = np.divmod(positions, block_size)
    lanes = np.repeat(np.arange(len(lens)), lens)
    places = block_table[lanes, pages].astype(np.int64) * block_size + offsets
    return View(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy((positions[starts[1:] - 1] + 1).astype(np.int32)),
        torch.from_numpy(block_table),
        torch.from_numpy(places),
    )


def move_rows(
    view: View,
    positions: NDArray[np.int64],  # [num_lanes]
    block_size: int,
) -> None:
    """Moves a view whose lanes have one row each to other positions, in place."""
    pages, offsets = np.divmod(positions, block_size)
    blocks = view.block_table.numpy()[np.arange(len(positions)), pages].astype(np.int64)
    view.seq_lens.copy_(torch.from_numpy(positions + 1))
    view.slot_mapping.copy_(torch.from_numpy(blocks * block_size + offsets))
