"""A frozen base model with trainable heads, as transformers' Trainer wants it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.training.cross_entropy import frozen_linear_cross_entropy
from vllm_accel.training.data import IGNORED

HEAD_WEIGHT_DECAY = 0.8  # Medusa's lambda_k = 0.8^k (arXiv 2401.10774, section 2.2)


class FrozenBaseWithHeads(nn.Module):
    """Predicts token t+2+i with head i from the base's hidden state at t.

    Args:
        base: a transformers causal language model.
        heads: to train.
        follow_base: learn the base's own first choices where the text went along with
            them, instead of the text.
    """

    def __init__(
        self, base: Any, heads: CerberusHeads, *, follow_base: bool = False
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.heads = heads
        self.follow_base = follow_base

    trained_name = "heads"

    @property
    def trained(self) -> CerberusHeads:
        """What learns."""
        return self.heads

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
        asked = self.asked(states, input_ids, labels)
        rows = (asked != IGNORED).any(dim=0)
        after = self.next_tokens(input_ids)[rows] if self.heads.reads_token else None
        drafted = self.heads(states[rows], after)
        losses = [
            HEAD_WEIGHT_DECAY**head * self._loss(head, said, wanted)
            for head, (said, wanted) in enumerate(zip(drafted, asked[:, rows], strict=True))
        ]
        return {"loss": torch.stack(losses).sum()}

    def next_tokens(self, input_ids: Tensor) -> Tensor:
        """[rows, tokens, hidden_size] embeddings of the tokens after each.

        Nobody asks a head at the last token, so what stands there does not matter.
        """
        embeddings: Tensor = self.base.get_input_embeddings()(input_ids.roll(-1, dims=1))
        return embeddings

    def asked(self, states: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """[draft_tokens, rows, tokens] what each head should say, or `IGNORED`."""
        heads = range(self.heads.draft_tokens)
        if not self.follow_base:
            return torch.stack([targets(labels, head) for head in heads])
        with torch.no_grad():
            choices = self.base.lm_head(states).max(dim=-1).indices
        said = functional.pad(choices[:, :-1], (1, 0), value=IGNORED)
        said = said.where(labels != IGNORED, IGNORED)
        return followed_targets(said, said == input_ids, len(heads))

    def _loss(self, head: int, states: Tensor, wanted: Tensor) -> Tensor:
        if self.heads.lm_heads is None:
            weight = self.base.lm_head.weight
            return frozen_linear_cross_entropy(states, weight, wanted)
        logits = functional.linear(states, self.heads.lm_heads[head])
        return functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED)


def targets(
    labels: Tensor,  # [rows, tokens] int64
    head: int,
) -> Tensor:
    """[rows, tokens]: what head `head` should say at each token, or `IGNORED`."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, : -(head + 2)] = labels[:, head + 2 :]
    return shifted


def followed_targets(
    said: Tensor,  # [rows, tokens] int64: the base's choice for each place
    followed: Tensor,  # [rows, tokens] bool: the text has that very token there
    heads: int,
) -> Tensor:
    """[heads, rows, tokens]: the base's choices along texts that follow them.

    At token t head i is asked for the base's choice at t+2+i if the text's tokens at t+1
    to t+1+i are the base's own: up to there text and greedy decoding are the same.
    """
    along = torch.ones_like(followed)
    asked = []
    for head in range(heads):
        along = along & _shifted(followed, head + 1, False)
        asked.append(_shifted(said, head + 2, IGNORED).where(along, IGNORED))
    return torch.stack(asked)


def _shifted(values: Tensor, by: int, fill: int | bool) -> Tensor:
    return functional.pad(values[:, by:], (0, by), value=fill)
