"""Running a step span by span: other rows, metadata and slots in each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_accel.host.decoder import Decoder
from vllm_accel.host.v1.lazyllm.attention import Scores
from vllm_accel.host.v1.lazyllm.keys import KeyLayout
from vllm_accel.lazyllm.pruner import Step
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import Groups
from vllm_accel.spans import Stream, View, view_of


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows between two spans, as one layer hands them to the next: exact to the bit."""

    hidden: Tensor  # [n, hidden_size]; token ids [n] before the first span
    residual: Tensor | None  # [n, hidden_size]; None there, and after the last span
    positions: Tensor  # [n] int64

    def entering(self, step: Step, k: int) -> "Rows":
        """With the rows that come back for span `k`."""
        stream = step.enter(k, Stream(self.hidden, self.positions))
        back = len(stream) - len(self.positions)
        residual = self.residual
        if residual is not None and back:
            none = residual.new_zeros(back, residual.shape[1])
            residual = torch.cat([residual, none])
        return Rows(stream.hidden, residual, stream.positions)

    def leaving(self, step: Step, k: int, importance: Mapping[str, Tensor]) -> "Rows":
        """Those that flow on after span `k`; the sum of the others' parts may be parked."""
        whole = self.hidden
        if step.parks and self.residual is not None:
            whole = self.hidden + self.residual
        before = step.origin
        stream = step.leave(k, Stream(whole, self.positions), importance)
        if len(stream) == len(self.positions):
            return self
        flowing = torch.from_numpy(np.flatnonzero(np.isin(before, step.origin)))
        residual = None if self.residual is None else self.residual[flowing]
        return Rows(self.hidden[flowing], residual, stream.positions)


class SpanForward:
    """Runs the spans of a step within vLLM's forward context.

    Args:
        runner: vLLM's, its KV cache made.
        decoder: its model's layers.
        schedule: the spans.
        groups: per span, its KV-cache groups.
    """

    def __init__(
        self, runner: Any, decoder: Decoder, schedule: Schedule, groups: Groups
    ) -> None:
        self._runner = runner
        self._decoder = decoder
        self._spans = schedule.spans
        self._groups = groups
        config = runner.kv_cache_config.kv_cache_groups
        self._layer_names = [group.layer_names for group in config]
        self._block_size: int = config[0].kv_cache_spec.block_size
        self._names = {
            _layer_index(name): name for names in self._layer_names for name in names
        }
        self._observe = schedule.observe
        context = runner.compilation_config.static_forward_context
        layer = context[self._names[0]]
        self._layout = KeyLayout(layer, self._block_size, layer.kv_cache.dtype)

    def run(self, step: Step, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens, hidden_size] after the final norm; zeros where a row was pruned.

        Args:
            input_ids: [num_tokens] int32, of all the step's rows.
            positions: [num_tokens] int64, likewise.
        """
        rows = Rows(input_ids, None, positions)
        for k, span in enumerate(self._spans):
            rows = rows.entering(step, k)
            scores = self._point_at(k, step)
            hidden, residual = self._decoder.run(
                span, rows.hidden, rows.residual, rows.positions
            )
            rows = Rows(hidden, residual, rows.positions)
            ahead = self._look_ahead(k, step, rows)
            rows = rows.leaving(step, k, {**averaged(scores), **averaged(ahead)})
        out = rows.hidden.new_zeros(len(positions), rows.hidden.shape[1])
        out[torch.from_numpy(step.origin)] = rows.hidden
        return out

    def ask(self, step: Step) -> list[Scores | None]:
        """Lets a step that runs as one be scored: per span, what is to be found."""
        metadata = get_forward_context().attn_metadata
        asked = [self._scores(k, step) for k in range(len(self._spans))]
        for scores in asked:
            if scores is not None:
                metadata[scores.layer_name].scores = scores
        return asked

    def _point_at(self, k: int, step: Step) -> Scores | None:
        """Lets the forward context say what the layers of a span write and read."""
        lanes = step.lanes(k)
        scores = self._scores(k, step)
        context = get_forward_context()
        for gid in self._groups[k]:
            view = view_of(
                lanes, lambda req_id, gid=gid: self._row(req_id, gid), self._block_size
            )
            metadata = self._metadata(gid, view)
            metadata.scores = scores
            for name in self._layer_names[gid]:
                context.attn_metadata[name] = metadata
                context.slot_mapping[name] = view.slot_mapping
        return scores

    def _look_ahead(self, k: int, step: Step, rows: Rows) -> Scores | None:
        """What the first layer of the next span looks at, run as far as that takes.

        It writes the keys of all rows; those that stay write theirs again.
        """
        lanes, asked = step.ahead(k)
        if not asked:
            return None
        layer = self._spans[k + 1].first
        name = self._names[layer]
        gid = next(g for g in self._groups[k + 1] if name in self._layer_names[g])
        view = view_of(lanes, lambda req_id: self._row(req_id, gid), self._block_size)
        metadata = self._metadata(gid, view)
        metadata.scores, metadata.only_scores = self._scored_by(name, asked, step), True
        context = get_forward_context()
        context.attn_metadata[name] = metadata
        context.slot_mapping[name] = view.slot_mapping
        count = len(view.slot_mapping)  # rows brought back stand behind
        residual = None if rows.residual is None else rows.residual[:count]
        self._decoder.attend(layer, rows.hidden[:count], residual, rows.positions[:count])
        return metadata.scores

    def _row(self, req_id: str, gid: int) -> list[int]:
        row: list[int] = self._runner.requests[req_id].block_ids[gid]
        return row

    def _metadata(self, gid: int, view: View) -> Any:
        (group,) = self._runner.attn_groups[gid]
        lengths = view.query_start_loc.diff()
        common = CommonAttentionMetadata(
            query_start_loc=view.query_start_loc,
            query_start_loc_cpu=view.query_start_loc,
            seq_lens=view.seq_lens,
            num_reqs=len(view.seq_lens),
            num_actual_tokens=len(view.slot_mapping),
            max_query_len=int(lengths.max()),
            max_seq_len=int(view.seq_lens.max()),
            block_table_tensor=view.block_table,
            slot_mapping=view.slot_mapping,
        )
        return group.get_metadata_builder().build(0, common)

    def _scores(self, k: int, step: Step) -> Scores | None:
        lanes = step.scored(k)
        name = self._names[self._spans[k].last]
        return self._scored_by(name, lanes, step) if lanes else None

    def _scored_by(self, name: str, lanes: Mapping[str, int], step: Step) -> Scores:
        layout, size = self._layout, self._block_size
        return Scores(name, lanes, layout, size, self._observe, step.num_drafts)


def averaged(scores: Scores | None) -> Mapping[str, Tensor]:
    """{req_id: [seq_len]} over the heads of all tensor-parallel ranks."""
    if scores is None:
        return {}
    group = get_tp_group()
    if group.world_size == 1:
        return scores.found
    joint = group.all_reduce(torch.cat(list(scores.found.values()))) / group.world_size
    parts = joint.split([len(found) for found in scores.found.values()])
    return dict(zip(scores.found, parts, strict=True))


def _layer_index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))
