"""The class vLLM's "custom_class" loads: our heads beside the target model."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_accel.cerberus import checkpoint
from vllm_accel.cerberus.drafter import CerberusDrafter, StepReport
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
        self._drafter = CerberusDrafter(heads, target.compute_logits, gate)
        logger.info("cerberus heads loaded from %s", folder)

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
