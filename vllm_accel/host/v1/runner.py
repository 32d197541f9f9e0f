"""Our part of Model Runner V1: drafts out, verdicts back, whatever drafts.

Mixed into whichever runner class vLLM built for the device (see `dress`).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput

from vllm_accel.host.report import Orders, attach, attached
from vllm_accel.host.v1 import greedy as greedy_path
from vllm_accel.host.v1 import room
from vllm_accel.speculate import Decoding, DraftBook, StepReport, Verdict, draft_room


class DraftingRunnerMixin:
    """Overrides of GPUModelRunner (vllm/v1/worker/gpu_model_runner.py, 0.32)."""

    def start_drafting(self) -> None:
        """State of our own, made when the runner is dressed."""
        self._book = DraftBook()
        self._report: StepReport | None = None
        self._target_logits: Tensor | None = None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Fills in what was not known when the step was scheduled."""
        room.fill(scheduler_output, self.requests, self._book)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """A step without drafts is prepared as plain vLLM does.

        The original asks whether there is a speculative config, not whether there are
        drafts, and gathers the metadata of none.
        """
        if scheduler_output.scheduled_spec_decode_tokens:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        config, self.speculative_config = self.speculative_config, None
        try:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        finally:
            self.speculative_config = config

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        """Keeps the logits for the gate; verifies greedy drafts by their largest."""
        self._target_logits = logits
        greedy = greedy_path.is_plain(self.input_batch.sampling_metadata)
        if spec_decode_metadata is None:
            if logits is not None and logits.dtype == torch.float32 and not greedy:
                # The plain sampler edits float32 logits in place; others it copies.
                self._target_logits = logits.clone()
        elif self._can_verify(greedy, logits):
            sampled = greedy_path.verified(
                self.sampler.greedy_sample(logits.to(torch.float32)),
                spec_decode_metadata.draft_token_ids,
                spec_decode_metadata.num_draft_tokens,
            )
            return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
        return super()._sample(logits, spec_decode_metadata)

    def _can_verify(self, greedy: bool, logits: Tensor | None) -> bool:
        """Whether the largest logits are all it takes; on GPU the original is as quick."""
        return (
            greedy
            and logits is not None
            and logits.is_cpu
            and not self.rejection_sampler.synthetic_mode
        )

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Heads need no positions: room is a matter of each request, not of the batch.

        The original stops drafting for everybody, and schedules drafts of zeros, as soon
        as one request comes close to the model's length.
        """
        return True

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sends this step's report to the scheduler with the sampled tokens."""
        self._report = None
        output = super().sample_tokens(grammar_output)
        self._target_logits = None
        if self._report is not None and isinstance(output, ModelRunnerOutput):
            attach(output, self._report)
        return output

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """Settles the last step's drafts, then drafts for this one's requests."""
        self._report = StepReport()
        self._book.keep_only(self.requests)
        orders = attached(scheduler_output)
        self.drafter.start_step(orders.measured, self.requests)
        self._settle(scheduler_output, sampled_token_ids)
        self._book.drop(self.input_batch.req_ids)
        drafted = (
            [0] * len(sampled_token_ids)
            if spec_decode_metadata is None
            else spec_decode_metadata.num_draft_tokens
        )
        num_rows = [1 + n for n in drafted]
        rows = list(last_accepted_rows(num_rows, sampled_token_ids))
        drafts = self._draft(rows, sampled_token_ids, sample_hidden_states, orders)
        for i, draft in enumerate(drafts):
            if draft:
                req_id = self.input_batch.req_ids[i]
                self._book.note(req_id, self._num_tokens(i), draft)
                if not orders.keep_drafts:
                    self._report.drafts[req_id] = draft
        return drafts

    def _draft(
        self,
        rows: Sequence[int],
        sampled_token_ids: list[list[int]],
        sample_hidden_states: Tensor,
        orders: Orders,
    ) -> list[list[int]]:
        """Draft tokens per request of the batch; `rows` as `last_accepted_rows` says."""
        raise NotImplementedError

    def _learn(self, verdict: Verdict) -> None:
        """Takes a verdict in."""
        self._report.add_verdict(verdict)

    def _settle(self, scheduler_output: Any, sampled_token_ids: list[list[int]]) -> None:
        """Matches what was sampled with what was drafted."""
        for req_id, draft in scheduler_output.scheduled_spec_decode_tokens.items():
            self._report.verified[req_id] = len(draft)
            i = self.input_batch.req_id_to_index[req_id]
            num_sampled = len(sampled_token_ids[i])
            if num_sampled == 0:
                continue
            position = self._num_tokens(i) - num_sampled
            verdict = self._book.settle(req_id, position, draft, num_sampled)
            if verdict is not None:
                self._learn(verdict)

    def _num_tokens(self, i: int) -> int:
        """Tokens of request `i`, those sampled in this step included."""
        return int(self.input_batch.num_tokens_no_spec[i])

    def _rooms(self, sampled_token_ids: list[list[int]], orders: Orders) -> list[int]:
        """Drafts each request can still use: none behind a token that ends it.

        The scheduler learns of the end when the next step is already queued. Without any
        room in that step the gate is asked all the same, so that there may be next time.
        """
        most = orders.most_drafts or self.max_model_len
        return [
            0 if self._ends(i, token_ids) else min(most, self._room(i))
            for i, token_ids in enumerate(sampled_token_ids)
        ]

    def _ends(self, i: int, token_ids: list[int]) -> bool:
        params = self.requests[self.input_batch.req_ids[i]].sampling_params
        ends = (params.eos_token_id, *(params.stop_token_ids or ()))
        return not set(ends).isdisjoint(token_ids)

    def _room(self, i: int) -> int:
        """Drafts request `i` can still use, if it goes on."""
        state = self.requests[self.input_batch.req_ids[i]]
        return draft_room(
            num_tokens=self._num_tokens(i),
            num_prompt_tokens=state.num_prompt_tokens,
            max_model_len=self.max_model_len,
            max_tokens=state.sampling_params.max_tokens,
            min_tokens=state.sampling_params.min_tokens,
        )


def last_accepted_rows(
    num_rows: list[int], sampled_token_ids: list[list[int]]
) -> Iterator[int]:
    """Per request, the logits row of its last accepted token; -1 if it sampled none."""
    firsts = accumulate(num_rows, initial=0)
    for first, token_ids in zip(firsts, sampled_token_ids, strict=False):
        yield first + len(token_ids) - 1 if token_ids else -1


class CerberusRunnerMixin(DraftingRunnerMixin):
    """Hands the hidden states to the heads."""

    def _draft(
        self,
        rows: Sequence[int],
        sampled_token_ids: list[list[int]],
        sample_hidden_states: Tensor,
        orders: Orders,
    ) -> list[list[int]]:
        """See `DraftingRunnerMixin._draft`."""
        requests = Decoding(
            req_ids=self.input_batch.req_ids,
            rows=rows,
            next_tokens=[ids[-1] if ids else 0 for ids in sampled_token_ids],
            room=self._rooms(sampled_token_ids, orders),
        )
        return self.drafter.propose(
            requests,
            sample_hidden_states,
            self._target_logits,
            self._report,
            may_draft=orders.most_drafts > 0,
        )

    def _learn(self, verdict: Verdict) -> None:
        """See `DraftingRunnerMixin._learn`; the gate learns too."""
        super()._learn(verdict)
        self.drafter.learn(verdict)
