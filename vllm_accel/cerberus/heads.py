"""The heads: K parallel stacks of residual blocks, linked sideways.

Depth j of every head needs only depth j-1 of two heads, so one depth is one batched
product over all heads and the critical path is the number of blocks, not of heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CerberusHeads(nn.Module):
    """Hidden state of the target at a token -> hidden states for the tokens after next.

    Head i (from 0) predicts the token i+2 places after the one whose hidden state it
    reads: the target itself predicts the next one. A shared LM head turns states into
    logits. Weights start at zero, where every head gives the target's own logits.

    Without cross-links this is Medusa (arXiv 2401.10774) with a shared LM head.

    The first block reads the target's hidden state once: there a head's own state and
    its neighbour's are the same, so two weight matrices would add up to one.

    Args:
        draft_tokens: K, number of heads.
        blocks: J, residual blocks per head; cross-links act from the second on.
        hidden_size: width of the target's hidden state.
        cross_links: blocks also read the state of the head before.
    """

    def __init__(
        self,
        *,
        draft_tokens: int,
        blocks: int,
        hidden_size: int,
        cross_links: bool = True,
    ) -> None:
        super().__init__()
        self.draft_tokens = draft_tokens
        self.cross_links = cross_links
        widths = [hidden_size] + [hidden_size * (1 + cross_links)] * (blocks - 1)
        self.weights = nn.ParameterList(
            torch.zeros(draft_tokens, hidden_size, width) for width in widths
        )
        self.biases = nn.ParameterList(
            torch.zeros(draft_tokens, hidden_size) for _ in widths
        )

    def forward(
        self,
        hidden_states: Tensor,  # [num_tokens, hidden_size] after the final norm
    ) -> Tensor:
        """[draft_tokens, num_tokens, hidden_size], for the target's LM head."""
        first_weight, *weights = self.weights
        first_bias, *biases = self.biases
        update = F.linear(hidden_states, first_weight.flatten(0, 1), first_bias.flatten())
        states = hidden_states + F.silu(_by_head(update, self.draft_tokens))
        for weight, bias in zip(weights, biases, strict=True):
            read = states
            if self.cross_links:
                before = torch.cat([hidden_states[None], states[:-1]])
                read = torch.cat([states, before], dim=-1)
            update = torch.baddbmm(bias[:, None], read, weight.transpose(1, 2))
            states = states + F.silu(update)
        return states

    def keep_first(self, draft_tokens: int) -> None:
        """Drops the heads after the first few; links only ever read earlier heads."""
        self.draft_tokens = draft_tokens
        for parameters in (self.weights, self.biases):
            for parameter in parameters:
                parameter.data = parameter.data[:draft_tokens].contiguous()

    def lay_out_for_inference(self) -> None:
        """Orders the linked blocks' weights in memory as the batched product reads them.

        Same values and shapes; on CPU a step reads them a third faster.
        """
        for weight in list(self.weights)[1:]:
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _by_head(
    update: Tensor,  # [num_tokens, heads * hidden_size]
    heads: int,
) -> Tensor:
    """[heads, num_tokens, hidden_size]"""
    return update.view(update.shape[0], heads, update.shape[1] // heads).transpose(0, 1)
