"""The class vLLM's "custom_class" loads: our heads beside the target model."""

import logging
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_accel.cerberus import checkpoint
from vllm_accel.cerberus.drafter import CerberusDrafter, Choose
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.memory import GateMemory
from vllm_accel.gating.policy import Always, LearningGate, Unlearning, make_gate
from vllm_accel.host import carrier
from vllm_accel.host.compiled import compiled
from vllm_accel.host.heads import folder_of
from vllm_accel.host.report import StepTime
from vllm_accel.on_disk import base_model, location
from vllm_accel.speculate import Decided, Decoding, StepReport, Verdict

logger = logging.getLogger("vllm.vllm_accel")

_MANY = 32
"""Requests compiled code is made for; it serves any other number as well."""


class CerberusProposer:
    """Loads the heads; drafts when the runner hands it the target's hidden states."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = carrier.unloaded(vllm_config)
        self._vllm_config = vllm_config
        self._model_config = vllm_config.model_config
        file = self._config.gate_state
        first = not vllm_config.parallel_config.data_parallel_index
        self._memory = GateMemory(Path(file), writes=first) if file else None
        self._gate: LearningGate | None = None
        self._drafter: CerberusDrafter | None = None

    def load_model(self, target: nn.Module) -> None:
        """Loads the heads in the target's dtype; called by vLLM after the target's."""
        folder = folder_of(self._config, self._model_config)
        _, heads = checkpoint.load(folder)
        heads.keep_first(self._config.num_speculative_tokens)
        heads.to(dtype=self._model_config.dtype, device=next(target.parameters()).device)
        heads.lay_out_for_inference()
        self._gate = self._make_gate(heads.draft_tokens)
        lm_head = self._lm_head(heads, target)
        self._drafter = CerberusDrafter(
            heads,
            target.embed_input_ids,
            lm_head,
            self._gate,
            compiled=self._compiled if lm_head != target.compute_logits else _as_it_is,
            share=decided_by_first_rank,
        )
        self._warm_up(heads)
        logger.info("cerberus heads loaded from %s", folder)

    def _make_gate(self, draft_tokens: int) -> LearningGate:
        """The gate; ranks after the first never ask theirs whether to draft."""
        if get_tp_group().rank_in_group:
            return Unlearning(Always())
        gate = make_gate(
            self._config.gate,
            draft_tokens=draft_tokens,
            entropy_threshold=self._config.entropy_threshold,
        )
        if self._memory is not None:
            self._memory.restore(gate)
        return gate

    def _lm_head(
        self, heads: CerberusHeads, target: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        """The target's own, or its rows of the tokens that can be drafted.

        The rows are few: every rank of a tensor-parallel engine holds them all, and none
        waits for the others' share of the logits.
        """
        if heads.draft_token_ids is None or heads.lm_heads is not None:
            return target.compute_logits
        folder = location.model_folder(
            self._model_config.model, self._model_config.revision
        )
        rows = heads.draftable_rows(base_model.lm_head_weight(folder))
        return partial(functional.linear, weight=rows.to(heads.weights[0]))

    def _compiled(self, choose: Choose) -> Choose:
        return compiled(choose, self._vllm_config)

    @torch.inference_mode()
    def _warm_up(self, heads: CerberusHeads) -> None:
        """Compiles for one request, and for any number, before the first one comes."""
        most = self._vllm_config.scheduler_config.max_num_seqs
        for num_reqs in (1, min(most, _MANY)):
            states = heads.weights[0].new_zeros(num_reqs, heads.weights[0].shape[-1])
            self._drafter.warm_up(states)

    def start_step(self, measured: list[StepTime], req_ids: Container[str]) -> None:
        """Tells the gate how long steps took and which requests still live."""
        for step in measured:
            self._gate.observe(step.shape, step.seconds)
        self._gate.keep_only(req_ids)
        if self._memory is not None and not get_tp_group().rank_in_group:
            self._memory.save_when_due(self._gate)

    def learn(self, verdict: Verdict) -> None:
        """Tells the gate what became of a draft."""
        self._gate.learn(verdict.req_id, verdict.verified, verdict.accepted)

    @torch.inference_mode()
    def propose(
        self,
        requests: Decoding,
        hidden_states: Tensor,
        logits: Tensor,
        report: StepReport,
        *,
        may_draft: bool,
    ) -> list[list[int]]:
        """See `CerberusDrafter.draft`; our runner calls this, vLLM's never does."""
        drafter: Any = self._drafter
        return drafter.draft(requests, hidden_states, logits, report, may_draft=may_draft)


def _as_it_is(choose: Choose) -> Choose:
    """For the target's own LM head, whose ranks talk to each other."""
    return choose


def decided_by_first_rank(decide: Callable[[], Decided]) -> Decided:
    """What rank 0 of the tensor-parallel group decides.

    Ranks would not decide alike on their own: the entropy of one row depends on the
    number of threads, and a rank that runs the heads alone waits for the others forever.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return decide()
    decided: Decided = group.broadcast_object(None if group.rank_in_group else decide())
    return decided
