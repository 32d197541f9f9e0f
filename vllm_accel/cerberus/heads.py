"""The heads: K parallel stacks of residual blocks, linked sideways.

Depth j of every head needs only depth j-1 of two heads, so one depth is one batched
product over all heads and the critical path is the number of blocks, not of heads.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CerberusHeads(nn.Module):
    """Hidden state of the target at a token -> hidden states for the tokens after next.

    Head i (from 0) predicts the token i+2 places after the one whose hidden state it
    reads: the target itself predicts the next one. Weights start at zero, where every
    head gives the target's own logits. Without cross-links this is Medusa (arXiv
    2401.10774).

    With `reads_token` they also read the embedding of the next token, which is known when
    they draft. That is not in the Cerberus paper, whose heads know the hidden state alone
    and have to guess what was sampled from it; Hydra (arXiv 2402.05109) does it for the
    drafted tokens as well, one head after the other.

    States become logits by the target's LM head, or by LM heads of their own. Both may be
    cut down to the tokens that are worth drafting, `draft_token_ids`.

    The first block reads the target's hidden state once: there a head's own state and
    its neighbour's are the same, so two weight matrices would add up to one.

    Args:
        draft_tokens: K, number of heads.
        blocks: J, residual blocks per head; cross-links act from the second on.
        hidden_size: width of the target's hidden state.
        cross_links: blocks also read the state of the head before.
        reads_token: heads also read the next token's embedding, as wide as the hidden
            state.
        vocab_size: of the target; needed for LM heads of their own only.
        own_lm_heads: an LM head per head, trained with it.
        draft_vocab_size: number of tokens that can be drafted; None: all.
    """

    def __init__(  # noqa: PLR0913  what a checkpoint says of them
        self,
        *,
        draft_tokens: int,
        blocks: int,
        hidden_size: int,
        cross_links: bool = True,
        reads_token: bool = False,
        vocab_size: int = 0,
        own_lm_heads: bool = False,
        draft_vocab_size: int | None = None,
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
        self.token_weight = (
            nn.Parameter(torch.zeros(hidden_size, hidden_size)) if reads_token else None
        )
        rows = draft_vocab_size or vocab_size
        self.lm_heads = (
            nn.Parameter(torch.zeros(draft_tokens, rows, hidden_size))
            if own_lm_heads
            else None
        )
        ids = torch.arange(draft_vocab_size) if draft_vocab_size else None
        self.draft_token_ids: Tensor | None
        self.register_buffer("draft_token_ids", ids)

    def forward(
        self,
        hidden_states: Tensor,  # [num_tokens, hidden_size] after the final norm
        next_tokens: Tensor | None = None,  # [num_tokens, hidden_size] embeddings
    ) -> Tensor:
        """[draft_tokens, num_tokens, hidden_size], for the target's LM head.

        Args:
            next_tokens: read with `reads_token` only.
        """
        if self.token_weight is not None:
            assert next_tokens is not None
            # Embeddings are of any scale; at unit size they weigh like hidden states.
            token = F.rms_norm(next_tokens, next_tokens.shape[-1:], eps=1e-10)
            hidden_states = hidden_states + F.linear(token, self.token_weight)
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

    def logits(
        self,
        states: Tensor,  # [draft_tokens, num_tokens, hidden_size], from `forward`
        lm_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """[draft_tokens, num_tokens, tokens that can be drafted].

        Args:
            lm_head: [n, hidden_size] -> [n, tokens that can be drafted], the target's;
                not asked where heads have their own.
        """
        if self.lm_heads is not None:
            return torch.bmm(states, self.lm_heads.transpose(1, 2))
        said: Tensor = lm_head(states.flatten(0, 1)).view(*states.shape[:2], -1)
        return said

    def draftable_rows(self, lm_head: Tensor) -> Tensor:
        """The rows of an LM head, [vocab, hidden_size], whose tokens can be drafted."""
        ids = self.draft_token_ids
        return lm_head if ids is None else lm_head[ids.to(lm_head.device)]

    def token_ids(self, choices: Tensor) -> Tensor:
        """Token ids of places in the last dimension of `logits`, any shape."""
        ids = self.draft_token_ids
        return choices if ids is None else ids[choices]

    def limit_vocabulary(self, token_ids: Tensor) -> None:
        """From now on drafts these tokens only; token_ids: [n] int64, ascending."""
        self.draft_token_ids = token_ids.to(self.weights[0].device)
        if self.lm_heads is not None:
            self.lm_heads.data = self.lm_heads.data[:, self.draft_token_ids].contiguous()

    @property
    def reads_token(self) -> bool:
        """Whether `forward` needs the next tokens' embeddings."""
        return self.token_weight is not None

    def keep_first(self, draft_tokens: int) -> None:
        """Drops the heads after the first few; links only ever read earlier heads."""
        self.draft_tokens = draft_tokens
        for parameter in self._by_head():
            parameter.data = parameter.data[:draft_tokens].contiguous()

    def _by_head(self) -> Iterator[nn.Parameter]:
        """The parameters whose first dimension is the head."""
        yield from self.weights
        yield from self.biases
        if self.lm_heads is not None:
            yield self.lm_heads

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
