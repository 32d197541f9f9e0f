"""What a gate may look at, computed only when it does."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


def entropy(
    logits: Tensor,  # [num_reqs, vocab] floating
) -> Tensor:
    """Entropy of softmax(logits), in nats (Cerberus' signal over the vocabulary).

    Returns:
        [num_reqs] float32.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(dim=-1)


class Signals:
    """The signals of one step, a row per request that could draft."""

    def __init__(
        self,
        logits: Tensor,  # [num_rows, vocab] the target's
        rows: Sequence[int],  # per request, the row of its last accepted token
    ) -> None:
        self._logits = logits
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def entropy(self) -> Tensor:
        """[num_reqs] float32, nats."""
        return entropy(self._logits[torch.tensor(self._rows, device=self._logits.device)])
