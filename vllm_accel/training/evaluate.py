"""Held-out figures of heads: how often they are right, and what a gate could use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_accel.cerberus.checkpoint import SelfTest
from vllm_accel.gating.signals import entropy
from vllm_accel.training.data import IGNORED, Row, collate
from vllm_accel.training.model import FrozenBaseWithHeads, targets

_SELF_TEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Observations:
    """One line per held-out token at which every head has a target."""

    hidden_states: Tensor  # [tokens, hidden_size]
    token_ids: Tensor  # [tokens, 1 + draft_tokens] the next token, then the heads'
    top5: Tensor  # [tokens, draft_tokens, 5] the heads' best, best first
    entropy: Tensor  # [tokens] float32 nats, of the base

    @property
    def accepted(self) -> Tensor:
        """[tokens] int64: leading heads whose first choice is right."""
        agree = self.top5[..., 0].eq(self.token_ids[:, 1:])
        return agree.long().cumprod(dim=1).sum(dim=1)

    def top_k_share(self, k: int) -> list[float]:
        """Per head, the share of tokens found among its k best."""
        hits = self.top5[..., :k].eq(self.token_ids[:, 1:, None]).any(dim=-1)
        return [round(share, 4) for share in hits.float().mean(dim=0).tolist()]

    def self_test(self) -> SelfTest:
        """A small spread of lines to try the heads on wherever they are loaded."""
        step = max(1, len(self.entropy) // _SELF_TEST_ROWS)
        return SelfTest(self.hidden_states[::step], self.token_ids[::step])


@torch.no_grad()
def observe(model: FrozenBaseWithHeads, rows: list[Row]) -> Observations:
    """Runs base and heads over held-out rows, keeping lines the base agrees with.

    Lines count where the base's own first choice is the text's next token: drafts are
    only ever made along what the base says.
    """
    parts = [_observe_row(model, row) for row in rows]
    return Observations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _observe_row(model: FrozenBaseWithHeads, row: Row) -> tuple[Tensor, ...]:
    batch = collate([row])
    heads = model.heads.draft_tokens
    device = next(model.heads.parameters()).device
    labels = batch["labels"].to(device)
    states = model.hidden_states(batch["input_ids"].to(device))
    logits = model.base.lm_head(states)[0]
    wanted = torch.stack([targets(labels, head)[0] for head in range(-1, heads)], dim=1)
    kept = (wanted != IGNORED).all(dim=1) & logits.argmax(dim=-1).eq(wanted[:, 0])
    states, logits, wanted = states[0, kept], logits[kept], wanted[kept]
    top5 = model.base.lm_head(model.heads(states)).topk(5, dim=-1).indices
    parts = (states.float(), wanted, top5.transpose(0, 1), entropy(logits))
    return tuple(part.cpu() for part in parts)


def best_entropy_threshold(seen: Observations, draft_cost: float) -> float:
    """Nats below which a draft step accepts more than it costs, on average.

    Args:
        draft_cost: extra time of a drafting step, in plain steps.

    Returns:
        The threshold with the greatest total gain, among the deciles of entropy.
    """
    gain = seen.accepted.float() - draft_cost
    candidates = torch.quantile(seen.entropy, torch.linspace(0.1, 1, 10)).tolist()
    totals = [float(gain[seen.entropy < nats].sum()) for nats in candidates]
    best = max(range(len(candidates)), key=totals.__getitem__)
    return round(float(max(candidates[best], 0.01)), 4)
