"""vLLM's forward context for some rows of a batch, where a span is to run on these only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.forward_context import ForwardContext, create_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_accel.spans import View, table_view


def context_of(
    runner: Any,
    requests: NDArray[np.int64],  # [num_lanes] places in the runner's batch
    lens: NDArray[np.int64],  # [num_lanes] rows of each
    positions: NDArray[np.int64],  # [num_tokens]
) -> ForwardContext:
    """The context in which these rows write into, and read, their requests' own slots.

    The rows of a request are the last tokens it sees. Slots must be there: scheduled, or
    looked ahead for.
    """
    metadata: dict[str, Any] = {}
    slot_mapping: dict[str, Any] = {}
    for gid, groups in enumerate(runner.attn_groups):
        table = runner.input_batch.block_table[gid]
        view = table_view(
            table.get_numpy_array()[requests], lens, positions, table.block_size
        )
        common = _common(view, int(lens.max()))
        for group in groups:
            built = group.build_metadata(common)
            metadata |= dict.fromkeys(group.layer_names, built)
            slot_mapping |= dict.fromkeys(group.layer_names, view.slot_mapping)
    return create_forward_context(metadata, runner.vllm_config, slot_mapping=slot_mapping)


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
