"""FREE's part of Model Runner V1: shallow steps after sampling, then the deep layers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, compress, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import override_forward_context
from vllm.v1.outputs import SamplerOutput

from vllm_accel.free.drafter import Shallow, Stackable
from vllm_accel.free.exit_head import ExitReading
from vllm_accel.free.resume import Split, split
from vllm_accel.free.stack import Seen, ShallowRows
from vllm_accel.host.report import Orders
from vllm_accel.host.v1 import final, greedy
from vllm_accel.host.v1.runner import DraftingRunnerMixin
from vllm_accel.host.v1.span_context import SpanContext


class FreeRunnerMixin(DraftingRunnerMixin):
    """Overrides of GPUModelRunner (vllm/v1/worker/gpu_model_runner.py, 0.32)."""

    def start_drafting(self) -> None:
        """See `DraftingRunnerMixin.start_drafting`."""
        super().start_drafting()
        self._kept_rows = 0
        self._deep_token_ids: list[list[int]] | None = None

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the spans while vLLM compiles the whole."""
        super().profile_run(*args, **kwargs)
        self.drafter.warm_up()

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Forgets exit states whose shallow KV is gone, before anything could match."""
        preempted = scheduler_output.preempted_req_ids or ()
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for req_id in (*preempted, *resumed, *scheduler_output.finished_req_ids):
            self.drafter.stacks.drop(req_id)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(
        self,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """With exit states at hand the deep layers go on from them; else as ever."""
        rows = self._split() if len(self.drafter.stacks) else None
        self._kept_rows = 0 if rows is None else len(rows.kept)
        if rows is None:
            return super()._model_forward(input_ids, positions, *args, **kwargs)
        handed_on, residual = self._exit_states(rows, input_ids, positions)
        return self.drafter.deepen(handed_on, residual, positions)

    def _split(self) -> Split | None:
        batch, num_reqs = self.input_batch, self.input_batch.num_reqs
        starts = self.query_start_loc.np[: num_reqs + 1].tolist()
        return split(
            self.drafter.stacks,
            batch.req_ids,
            starts,
            batch.num_computed_tokens_cpu[:num_reqs].tolist(),
            self.input_ids.np[: starts[-1]],
        )

    def _exit_states(
        self, rows: Split, input_ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of all rows: kept ones, and the rest run through the shallow layers now."""
        known = self.drafter.stacks.states[torch.from_numpy(rows.states)]
        states = known.new_empty(len(positions), known.shape[1])
        states[torch.from_numpy(rows.kept)] = known
        if len(rows.rest):
            rest = torch.from_numpy(rows.rest)
            places = positions[rest]
            context = SpanContext(self, rows.requests, rows.lens, places.numpy())
            with override_forward_context(context.forward):
                states[rest] = self.drafter.shallow(input_ids[rest], places)
        handed_on, residual = states.chunk(2, dim=-1)
        return handed_on.contiguous(), residual.contiguous()

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        """Where drafts are final, lets the sampler see nothing but the draft."""
        self._deep_token_ids = None
        drafts = (
            [] if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        )
        if any(drafts) and self.drafter.drafts_are_final:
            said = self.sampler.greedy_sample(logits.to(torch.float32)).tolist()
            rows = [0, *accumulate(1 + n for n in drafts)]
            self._deep_token_ids = [said[a:b] for a, b in pairwise(rows)]
            return self._sample_final(logits, drafts, spec_decode_metadata)
        return super()._sample(logits, spec_decode_metadata)

    def _sample_final(
        self, logits: Tensor, num_drafts: Sequence[int], spec_decode_metadata: Any
    ) -> Any:
        rows = spec_decode_metadata.target_logits_indices
        token_ids = spec_decode_metadata.draft_token_ids
        stacks, limit = self.drafter.stacks, self.drafter.rollback
        drafts = zip(self.input_batch.req_ids, num_drafts, strict=True)
        # A draft whose stack is gone is verified.
        flags = [(stacks.final(i) + [False] * count)[:count] for i, count in drafts]
        stand = final.standing(logits, rows, token_ids, flags, limit)
        if self._can_verify(greedy.is_plain(self.input_batch.sampling_metadata), logits):
            deep = self._deep_token_ids
            sampled = final.sampled(deep, token_ids.tolist(), stand.tolist(), num_drafts)
            return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
        masked = final.only_drafts(logits, rows[stand], token_ids[stand])
        return super()._sample(masked, spec_decode_metadata)

    def _settle(self, scheduler_output: Any, sampled_token_ids: list[list[int]]) -> None:
        """See `DraftingRunnerMixin._settle`; the gate learns of every stack."""
        super()._settle(scheduler_output, sampled_token_ids)
        stacks = self.drafter.stacks
        stacks.keep_only(self.requests)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        for i, req_id in enumerate(self.input_batch.req_ids):
            if req_id not in stacks:
                continue
            position = self._num_tokens(i) - len(sampled_token_ids[i]) - 1
            deep = sampled_token_ids if not self._deep_token_ids else self._deep_token_ids
            flags = stacks.final(req_id)
            seen = stacks.settle(req_id, position, deep[i])
            if seen is not None:
                given = max(0, len(sampled_token_ids[i]) - 1)  # the last one is the deep's
                stood = min(given, len(scheduled.get(req_id, [])))
                self._learn_of(replace(seen, stood=stood), flags)

    def _learn_of(self, seen: Seen, final: Sequence[bool]) -> None:
        self.drafter.learn(seen)
        if self.drafter.drafts_are_final:
            agreed = list(compress(seen.agree, final[: seen.given]))
            self._report.final[seen.req_id] += len(agreed)
            self._report.final_agreed += sum(agreed)

    def _room(self, i: int) -> int:
        """See `DraftingRunnerMixin._room`; a final draft must be what would be sampled."""
        params = self.requests[self.input_batch.req_ids[i]].sampling_params
        if self.drafter.drafts_are_final and not self._may_be_final(params):
            return 0
        return super()._room(i)

    def _may_be_final(self, params: Any) -> bool:
        asked = final.quality(params, self.drafter.exit_quality)
        return asked < 1 and final.allowed(params)

    def _draft(
        self,
        rows: Sequence[int],
        sampled_token_ids: list[list[int]],
        sample_hidden_states: Tensor,
        orders: Orders,
    ) -> list[list[int]]:
        """See `DraftingRunnerMixin._draft`."""
        self._report.kept_rows = self._kept_rows
        req_ids = self.input_batch.req_ids
        params = [self.requests[req_id].sampling_params for req_id in req_ids]
        step = Stackable(
            req_ids=req_ids,
            rows=rows,
            next_tokens=[ids[-1] if ids else 0 for ids in sampled_token_ids],
            room=self._rooms(sampled_token_ids, orders),
            positions=[self._num_tokens(i) - 1 for i in range(len(rows))],
            stop_token_ids=[one.all_stop_token_ids for one in params],
            quality=[final.quality(one, self.drafter.exit_quality) for one in params],
        )
        return self.drafter.propose(
            step, self._shallow_steps(), self._report, may_draft=orders.most_drafts > 0
        )

    def _shallow_steps(self) -> Shallow:
        """Runs one token of each of some requests, in a step's KV-cache blocks."""
        drafting: list[str] = []
        context: SpanContext | None = None

        def run(rows: ShallowRows) -> ExitReading:
            nonlocal context, drafting
            positions = np.array(rows.positions)
            if context is None or drafting != rows.req_ids:
                index = self.input_batch.req_id_to_index
                requests = np.array([index[req_id] for req_id in rows.req_ids])
                context = SpanContext(self, requests, np.ones_like(requests), positions)
                drafting = rows.req_ids
            else:
                context.move_to(positions)
            with override_forward_context(context.forward):
                token_ids = torch.tensor(rows.token_ids, dtype=torch.int32)
                return self.drafter.read(token_ids, torch.from_numpy(positions))

        return run
