"""vLLM's forward context for some rows of a batch, where a span is to run on these only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.forward_context import create_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_accel.spans import View, move_rows, table_view

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Part:
    """What the layers of one KV-cache group are told."""

    groups: Sequence[Any]
    """vLLM's AttentionGroup."""
    view: View
    block_size: int
    common: CommonAttentionMetadata


class SpanContext:
    """The context in which some rows write into, and read, their requests' own slots.

    The rows of a request are the last tokens it sees. Slots must be there: scheduled, or
    looked ahead for.

    Args:
        runner: vLLM's.
        requests: [num_lanes] places in the runner's batch.
        lens: [num_lanes] rows of each.
        positions: [num_tokens]
    """

    def __init__(self, runner: Any, requests: Places, lens: Places, positions: Places):
        self._parts = list(_parts(runner, requests, lens, positions))
        self.forward = create_forward_context({}, runner.vllm_config, slot_mapping={})
        for part in self._parts:
            self._tell(part)

    def move_to(self, positions: Places) -> None:
        """Other positions [num_lanes] of the same requests, which have one row each.

        In place; only what the kernel schedules by is made anew.
        """
        for part in self._parts:
            move_rows(part.view, positions, part.block_size)
            part.common.max_seq_len = int(positions.max()) + 1
            self._tell(part)

    def _tell(self, part: _Part) -> None:
        for group in part.groups:
            names, built = group.layer_names, group.build_metadata(part.common)
            self.forward.attn_metadata.update(dict.fromkeys(names, built))
            slots = dict.fromkeys(names, part.view.slot_mapping)
            self.forward.slot_mapping.update(slots)


def _parts(
    runner: Any, requests: Places, lens: Places, positions: Places
) -> Iterator[_Part]:
    for gid, groups in enumerate(runner.attn_groups):
        table = runner.input_batch.block_table[gid]
        block_size = table.block_size
        rows = table.get_numpy_array()[requests]
        view = table_view(rows, lens, positions, block_size)
        yield _Part(groups, view, block_size, _common(view, int(lens.max())))


def _common(view: View, max_query_len: int) -> CommonAttentionMetadata:
    return CommonAttentionMetadata(
        query_start_loc=view.query_start_loc,
        query_start_loc_cpu=view.query_start_loc,
        seq_lens=view.seq_lens,
        num_reqs=len(view.seq_lens),
        num_actual_tokens=len(view.slot_mapping),
        max_query_len=max_query_len,
        max_seq_len=int(view.seq_lens.max()),
        block_table_tensor=view.block_table,
        slot_mapping=view.slot_mapping,
    )
