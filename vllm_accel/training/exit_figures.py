"""Held-out figures of an exit: how often it is right, and whether it knows when."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_accel.free.checkpoint import SelfTest
from vllm_accel.free.exit_head import ExitSignals
from vllm_accel.training.data import IGNORED, Row, collate
from vllm_accel.training.model import targets
from vllm_accel.training.shallow_deep import ShallowDeep

QUALITY = 0.99
"""Share of exits that are to agree with the deep layers at the saved threshold."""

_SELF_TEST_ROWS = 64
_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class ExitObservations:
    """One line per held-out token after which somebody is asked for the next."""

    exit_states: Tensor  # [tokens, hidden_size] after `exit_layer` layers
    normed_states: Tensor  # [tokens, hidden_size] after adapter and final norm
    token_ids: Tensor  # [tokens, 2] the shallow model's first choice, the deep one's
    confidence: Tensor  # [tokens] float32
    ends: Tensor  # [tokens] bool, the last line of its text

    @property
    def agree(self) -> Tensor:
        """[tokens] bool: both first choices are one."""
        return self.token_ids[:, 0].eq(self.token_ids[:, 1])

    def mean_run(self) -> float:
        """Tokens in a row the shallow model gets right, from one mistake to the next."""
        stops = int((~self.agree | self.ends).sum())
        return float(self.agree.sum()) / stops

    def exit_table(self) -> list[dict[str, float | None]]:
        """Per threshold, the share of tokens that exit and how many of these agree."""
        return [self._exits(threshold) for threshold in _THRESHOLDS]

    def _exits(self, threshold: float) -> dict[str, float | None]:
        leaves = self.confidence > threshold
        right = self.agree[leaves].float().mean() if leaves.any() else None
        return {
            "threshold": threshold,
            "exit_rate": round(float(leaves.float().mean()), 4),
            "agreement": None if right is None else round(float(right), 4),
        }

    def threshold(self) -> float:
        """The lowest confidence above which `QUALITY` of exits agree; 1 if none does."""
        order = self.confidence.argsort(descending=True)
        right = self.agree[order].double().cumsum(0)
        share = right / torch.arange(1, len(order) + 1)
        good = (share >= QUALITY).nonzero().flatten()
        if len(good) == 0:
            return 1.0
        exits = int(good[-1]) + 1
        if exits == len(order):
            return 0.0
        return _rounded_up(float(self.confidence[order[exits]]))

    def self_test(self, model: ShallowDeep) -> SelfTest:
        """A small spread of lines to try the exit on wherever it is loaded."""
        step = max(1, len(self.ends) // _SELF_TEST_ROWS)
        states, normed = self.exit_states[::step], self.normed_states[::step]
        return SelfTest.of(model.adapter.cpu(), states, normed, self.token_ids[::step])


@torch.no_grad()
def observe(model: ShallowDeep, rows: list[Row]) -> ExitObservations:
    """Runs both depths over held-out rows."""
    parts = [_observe_row(model, row) for row in rows]
    return ExitObservations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _observe_row(model: ShallowDeep, row: Row) -> tuple[Tensor, ...]:
    batch = {name: ids.to(model.base.device) for name, ids in collate([row]).items()}
    asked = targets(batch["labels"], -1) != IGNORED
    layers = model.layer_states(batch["input_ids"])
    exit_states, deep = layers[model.exit_layer][asked], layers[-1][asked]
    normed = model.head.states(exit_states)
    shallow = ExitSignals(model.head.lm_head(normed))
    said = torch.stack([shallow.token_ids, model.head.lm_head(deep).argmax(dim=-1)], dim=1)
    ends = torch.zeros(len(said), dtype=torch.bool)
    ends[-1:] = True
    parts = (exit_states.float(), normed.float(), said, shallow.confidence, ends)
    return tuple(part.cpu() for part in parts)


@torch.no_grad()
def deep_loss(model: ShallowDeep, rows: list[Row]) -> float:
    """Nats per token of the whole model on rows as they are."""
    total, tokens = 0.0, 0
    for row in rows:
        batch = {name: ids.to(model.base.device) for name, ids in collate([row]).items()}
        wanted = targets(batch["labels"], -1)
        asked = wanted != IGNORED
        logits = model.head.lm_head(model.layer_states(batch["input_ids"])[-1][asked])
        total += float(
            functional.cross_entropy(logits.float(), wanted[asked], reduction="sum")
        )
        tokens += int(asked.sum())
    return total / max(1, tokens)


def area_under_roc(
    score: Tensor,  # [n] float32
    positive: Tensor,  # [n] bool
) -> float | None:
    """P(score of a positive > of a negative), ties counted half; None if one is missing."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    middle = count.cumsum(0).double() - (count.double() - 1) / 2
    above = float(middle[place][positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def figures(seen: ExitObservations) -> dict[str, Any]:
    """What `metrics.json` says of an exit."""
    area = area_under_roc(seen.confidence, seen.agree)
    return {
        "held_out_tokens": len(seen.ends),
        "agreement": round(float(seen.agree.float().mean()), 4),
        "mean_agreed_run": round(seen.mean_run(), 4),
        "confidence_auc": None if area is None else round(area, 4),
        "thresholds": seen.exit_table(),
        "threshold": seen.threshold(),
    }


def _rounded_up(share: float) -> float:
    return min(1.0, math.ceil(share * 1e4) / 1e4)
