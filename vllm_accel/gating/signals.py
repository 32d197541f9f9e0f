"""What a gate may look at, computed only when it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LEAST = -80.0  # nats below the best; exp of it is nothing in float32


def entropy(
    logits: Tensor,  # [num_reqs, vocab] floating
) -> Tensor:
    """Entropy of softmax(logits), in nats (Cerberus' signal over the vocabulary).

    Returns:
        [num_reqs] float32.
    """
    below = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    below = below.clamp_(min=_LEAST)  # a forbidden token is at -inf, and 0 * inf is nan
    odds = below.exp()
    total = odds.sum(dim=-1)
    return total.log() - (odds * below).sum(dim=-1) / total


def margin(
    logits: Tensor,  # [num_reqs, vocab] floating
) -> Tensor:
    """Probability of the first choice less that of the second (FREE's confidence).

    Returns:
        [num_reqs] float32.
    """
    best = torch.softmax(logits.float(), dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def feature_entropy(
    hidden_states: Tensor,  # [num_reqs, hidden_size]
) -> Tensor:
    """Entropy over the features, in nats: the literal "entropy of the hidden state".

    Returns:
        [num_reqs] float32.
    """
    return entropy(hidden_states)


def confidence(
    logits: Tensor,  # [..., tokens] floating, of a head
    best: Tensor,  # [...] the largest of them
) -> Tensor:
    """Probability a head gives its first choice: [...] float32."""
    return (best.float() - torch.logsumexp(logits.float(), dim=-1)).exp()


class Signals:
    """The signals of one step, a row per request that could draft."""

    def __init__(
        self,
        logits: Tensor,  # [num_rows, vocab] the target's
        rows: Sequence[int],  # per request, the row of its last accepted token
        req_ids: Sequence[str] = (),
        num_decoding: int | None = None,
    ) -> None:
        self._logits = logits
        self._rows = rows
        self.req_ids = req_ids
        """Per request, its id."""
        self.num_decoding = len(rows) if num_decoding is None else num_decoding
        """Requests that decode, those without room for a draft included."""

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def entropy(self) -> Tensor:
        """[num_reqs] float32, nats."""
        return entropy(self._logits[torch.tensor(self._rows, device=self._logits.device)])


@dataclass(frozen=True, slots=True)
class DraftSignals:
    """The signals of drafts just made, for the requests whose heads ran."""

    confidence: Tensor
    """[draft_tokens, num_reqs] float32: what each head gives its first choice."""

    @property
    def draft_tokens(self) -> int:
        """Tokens drafted for each request."""
        return len(self.confidence)

    def __len__(self) -> int:
        return int(self.confidence.shape[1])
