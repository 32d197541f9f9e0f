"""A frozen base model with trainable heads, as transformers' Trainer wants it."""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.training.cross_entropy import frozen_linear_cross_entropy
from vllm_accel.training.data import IGNORED

HEAD_WEIGHT_DECAY = 0.8  # Medusa's lambda_k = 0.8^k (arXiv 2401.10774, section 2.2)


class FrozenBaseWithHeads(nn.Module):
    """Predicts token t+2+i with head i from the base's hidden state at t."""

    def __init__(self, base: Any, heads: CerberusHeads) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.heads = heads

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[rows, tokens, hidden_size] after the base's final norm."""
        with torch.no_grad():
            outputs = self.base.base_model(input_ids=input_ids, use_cache=False)
        states: Tensor = outputs.last_hidden_state
        return states

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"loss": []}: cross-entropy of every head, weighted 0.8^i.

        Args:
            input_ids: [rows, tokens] int64.
            labels: [rows, tokens] int64; `IGNORED` where nobody is asked.
        """
        states = self.hidden_states(input_ids)
        asked = torch.stack(
            [targets(labels, head) for head in range(self.heads.draft_tokens)]
        )
        rows = (asked != IGNORED).any(dim=0)
        losses = [
            HEAD_WEIGHT_DECAY**head
            * frozen_linear_cross_entropy(said, self.base.lm_head.weight, wanted)
            for head, (said, wanted) in enumerate(
                zip(self.heads(states[rows]), asked[:, rows], strict=True)
            )
        ]
        return {"loss": torch.stack(losses).sum()}


def targets(
    labels: Tensor,  # [rows, tokens] int64
    head: int,
) -> Tensor:
    """[rows, tokens]: what head `head` should say at each token, or `IGNORED`."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, : -(head + 2)] = labels[:, head + 2 :]
    return shifted
