"""What the model would say if it ended after its first layers, and how sure of it."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_accel.gating import signals

ADAPTERS = ("none", "mlp", "low_rank")
"""No adapter as in the paper; a residual MLP; the same without its nonlinearity."""

_LEAST_SCALE = 1e-6  # of a state's mean square, so that a state of zeros stays finite


class ExitAdapter(nn.Module):
    """Brings exit states closer to what the final norm expects; an identity untrained.

    Not in the paper, which trains the whole model instead. The update is computed from the
    state brought to unit size and scaled back, so the adapter commutes with scaling, as
    final norms do: it does not have to learn how large a layer's states happen to be.

    Args:
        kind: one of `ADAPTERS`.
        hidden_size: of the model.
        width: numbers in the middle; 0 where there is no adapter.
    """

    def __init__(self, kind: str, hidden_size: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.down = nn.Linear(hidden_size, width, bias=kind == "mlp")
            self.up = nn.Linear(width, hidden_size, bias=False)
            nn.init.zeros_(self.up.weight)

    def forward(
        self,
        exit_states: Tensor,  # [..., hidden_size] before any final norm
    ) -> Tensor:
        """[..., hidden_size], for the final norm."""
        if self.kind == "none":
            return exit_states
        mean_square = exit_states.float().square().mean(dim=-1, keepdim=True)
        scale = (mean_square + _LEAST_SCALE).sqrt().to(exit_states.dtype)
        inner = self.down(exit_states / scale)
        if self.kind == "mlp":
            inner = functional.silu(inner)
        update: Tensor = self.up(inner)
        return exit_states + scale * update


class ExitReading(NamedTuple):
    """What the layers before the exit came to, a row per token that was run."""

    handed_on: Tensor
    """[rows, hidden_size]: what the last of them hands on."""
    residual: Tensor
    """[rows, hidden_size]: what it leaves to be added."""
    exit_states: Tensor
    """[rows, hidden_size]: both added."""
    logits: Tensor
    """[rows, vocab]"""
    token_ids: Tensor
    """[rows] int64: first choices."""
    confidence: Tensor
    """[rows] float32: see `choices`."""

    @property
    def kept(self) -> Tensor:
        """[rows, 2 * hidden_size]: what is handed on and its residual, side by side.

        Not put together where the reading is compiled: the compiler of torch 2.13 then
        adds the two before what is handed on is there.
        """
        return torch.cat((self.handed_on, self.residual), dim=-1)


class ExitHead:
    """The shallow model's ending: adapter, then the model's own final norm and LM head.

    With the state after the last layer and no adapter it gives the model's own logits.

    Args:
        adapter: in the model's dtype, on its device.
        norm: [n, hidden_size] -> the same, the model's final norm.
        lm_head: [n, hidden_size] -> [n, vocab], whatever the model makes logits with.
        dtype: the model's; None where states come in it already.
    """

    def __init__(
        self,
        adapter: ExitAdapter,
        norm: Callable[[Tensor], Tensor],
        lm_head: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        self.adapter = adapter
        self.normed = norm
        self.lm_head = lm_head

    def states(self, exit_states: Tensor) -> Tensor:
        """[n, hidden_size] after the final norm, of states [n, hidden_size] before it."""
        if self._dtype is not None:
            exit_states = exit_states.to(self._dtype)
        return self.normed(self.adapter(exit_states))

    def logits(
        self,
        exit_states: Tensor,  # [n, hidden_size] after `exit_layer` layers, residual added
    ) -> Tensor:
        """[n, vocab]"""
        return self.lm_head(self.states(exit_states))

    def read(
        self,
        handed_on: Tensor,  # [n, hidden_size]
        residual: Tensor,  # [n, hidden_size]
    ) -> ExitReading:
        """The shallow model's word on rows as they leave the last layer before the exit."""
        exit_states = handed_on + residual
        logits = self.logits(exit_states)
        return ExitReading(handed_on, residual, exit_states, logits, *choices(logits))


def choices(
    logits: Tensor,  # [n, vocab]
) -> tuple[Tensor, Tensor]:
    """First choices [n] int64, and FREE's confidence of each [n] float32.

    The confidence is the best probability less the second, `signals.margin`; from the two
    best logits, which are looked for anyway, at half of its time.
    """
    best = logits.topk(2, dim=-1)
    shares = signals.confidence(logits[:, None], best.values)
    return best.indices[:, 0], shares[:, 0] - shares[:, 1]


class ExitSignals:
    """The shallow model's choices in one shallow step, a row per request that drafts."""

    def __init__(
        self,
        logits: Tensor,  # [num_reqs, vocab] of the exit head
        req_ids: Sequence[str] = (),
        quality: Sequence[float] = (),
        reading: ExitReading | None = None,  # where they are from
    ) -> None:
        self._logits = logits
        self.exit_states = reading.exit_states if reading else None
        """[num_reqs, hidden_size] after the layers before the exit, for what a gate of
        yours has learnt to read from them."""
        self.req_ids = req_ids
        """Per request, its id."""
        self.quality = quality
        """Per request, the share of its tokens that the deep layers should agree with."""
        chosen = (reading.token_ids, reading.confidence) if reading else choices(logits)
        self.token_ids: Tensor = chosen[0]
        """[num_reqs] int64: the shallow model's first choices."""
        self.confidence: Tensor = chosen[1]
        """[num_reqs] float32: best probability less the second."""

    def __len__(self) -> int:
        return int(self._logits.shape[0])

    @cached_property
    def sureness(self) -> list[float]:
        """`confidence` as numbers: the gate and the stack both ask."""
        sure: list[float] = self.confidence.tolist()
        return sure

    @cached_property
    def entropy(self) -> Tensor:
        """[num_reqs] float32, nats."""
        return signals.entropy(self._logits)
