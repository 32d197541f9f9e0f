"""The class vLLM's "custom_class" loads: our heads beside the target model."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig

from vllm_accel.cerberus import base_model, checkpoint, location
from vllm_accel.cerberus.drafter import CerberusDrafter, StepReport
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import make_gate
from vllm_accel.host import carrier
from vllm_accel.host.heads import folder_of

logger = logging.getLogger("vllm.vllm_accel")


class CerberusProposer:
    """Loads the heads; drafts when the runner hands it the target's hidden states."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = carrier.unloaded(vllm_config)
        self._model_config = vllm_config.model_config
        self._drafter: CerberusDrafter | None = None

    def load_model(self, target: nn.Module) -> None:
        """Loads the heads in the target's dtype; called by vLLM after the target's."""
        folder = folder_of(self._config, self._model_config)
        _, heads = checkpoint.load(folder)
        heads.keep_first(self._config.num_speculative_tokens)
        heads.to(dtype=self._model_config.dtype, device=next(target.parameters()).device)
        heads.lay_out_for_inference()
        gate = make_gate(
            self._config.gate, entropy_threshold=self._config.entropy_threshold
        )
        self._drafter = CerberusDrafter(heads, self._lm_head(heads, target), gate)
        logger.info("cerberus heads loaded from %s", folder)

    def _lm_head(
        self, heads: CerberusHeads, target: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        """The target's own, or its rows of the tokens that can be drafted.

        The rows are few: every rank of a tensor-parallel engine holds them all and drafts
        the same without a word to the others.
        """
        if heads.draft_token_ids is None or heads.lm_heads is not None:
            return target.compute_logits
        folder = location.model_folder(
            self._model_config.model, self._model_config.revision
        )
        rows = heads.draftable_rows(base_model.lm_head_weight(folder))
        return partial(functional.linear, weight=rows.to(heads.weights[0]))

    @torch.inference_mode()
    def propose(
        self,
        rows: list[int],
        room: list[int],
        hidden_states: Tensor,
        logits: Tensor,
        report: StepReport,
    ) -> list[list[int]]:
        """See `CerberusDrafter.draft`; our runner calls this, vLLM's never does."""
        drafter: Any = self._drafter
        return drafter.draft(rows, room, hidden_states, logits, report)
