"""`vllm-accel train cerberus`: heads on a frozen base, by transformers' Trainer."""

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_accel.cerberus import checkpoint, medusa
from vllm_accel.cerberus.checkpoint import MAX_BLOCKS
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import ConfigError
from vllm_accel.on_disk import base_model
from vllm_accel.training import card, data, evaluate, runs
from vllm_accel.training.model import FrozenBaseWithHeads
from vllm_accel.training.precision import SAVED_DTYPE, fast_dtype, round_as_saved

logger = logging.getLogger(__name__)

HEADS = ("cerberus", "medusa")
"""Kinds of heads: linked, or Medusa's single block, which vLLM's own `medusa` loads."""

VLLM_MEDUSA = "vllm_medusa"
"""Folder beside Medusa heads with the same in vLLM's own format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun(runs.Run):
    """What `train cerberus` is asked for; the command line's options, one to one."""

    heads: str = "cerberus"
    targets: str = "data"
    draft_tokens: int = 4
    blocks: int = 2
    cross_links: bool = True
    reads_token: bool = True
    own_lm_heads: bool = False
    draft_vocab: int = 0
    draft_cost: float = 0.35

    def __post_init__(self) -> None:
        runs.check_choice(self, "heads", HEADS)
        runs.check_choice(self, "targets", runs.TARGETS)
        if self.heads == "medusa":
            object.__setattr__(self, "blocks", 1)
            object.__setattr__(self, "cross_links", False)
            object.__setattr__(self, "reads_token", False)
        runs.check_range(self, "draft_tokens", 1, MAX_DRAFT_TOKENS)
        runs.check_range(self, "blocks", 1, MAX_BLOCKS)


def train(run: TrainingRun) -> dict[str, Any]:
    """Trains, measures and saves heads; resumes if the output holds a checkpoint.

    Returns:
        The held-out figures, as written to `OUTPUT/metrics.json`.

    Raises:
        ConfigError: the data or the tokenizer do not fit the model.
    """
    begun = runs.prepare(run, fast_dtype())
    base, training = begun.base, begun.training
    heads = _new_heads(run, base)
    model = FrozenBaseWithHeads(base, heads, follow_base=run.targets == "base")
    if not runs.fit(run, begun, model):
        return {}
    round_as_saved(model.heads)
    if run.heads == "medusa":
        medusa.write_for_vllm(run.output / VLLM_MEDUSA, heads, base.lm_head.weight)
    if 0 < run.draft_vocab < base.config.vocab_size:
        heads.limit_vocabulary(data.most_frequent(training, run.draft_vocab))
    figures = _finish(run, begun.folder, model, begun.held_out)
    card.write_heads(run.output, run, figures, len(training))
    return figures


def _new_heads(run: TrainingRun, base: Any) -> CerberusHeads:
    width = base.get_input_embeddings().weight.shape[-1]
    if width != base.config.hidden_size:
        raise ConfigError(
            f"{run.model} has embeddings of width {width} and hidden states of width "
            f"{base.config.hidden_size}: expected the same; heads for such models are not "
            "supported, use another model."
        )
    heads = CerberusHeads(
        draft_tokens=run.draft_tokens,
        blocks=run.blocks,
        hidden_size=base.config.hidden_size,
        cross_links=run.cross_links,
        reads_token=run.reads_token,
        vocab_size=base.config.vocab_size,
        own_lm_heads=run.own_lm_heads,
    )
    if heads.lm_heads is not None:
        heads.lm_heads.data[:] = base.lm_head.weight.float()
    return heads


def _finish(
    run: TrainingRun, folder: Path, model: FrozenBaseWithHeads, held_out: list[data.Row]
) -> dict[str, Any]:
    seen = evaluate.observe(model, evaluate.continued(model, held_out))
    if len(seen.entropy) == 0:
        raise ConfigError(
            "No held-out token can be scored (rows too short, or none the model agrees "
            "with): expected longer rows; give more text or raise --held-out-rows."
        )
    test = seen.self_test()
    test = dataclasses.replace(test, hidden_states=test.hidden_states.to(SAVED_DTYPE))
    threshold = evaluate.best_entropy_threshold(seen, run.draft_cost)
    figures = {
        "held_out_tokens": len(seen.entropy),
        "top1": seen.top_k_share(1),
        "top5": seen.top_k_share(5),
        "accepted_per_step": round(float(seen.accepted.float().mean()), 4),
        "entropy_threshold": threshold,
    }
    config = checkpoint.HeadsConfig(
        format=checkpoint.FORMAT,
        draft_tokens=run.draft_tokens,
        blocks=run.blocks,
        hidden_size=model.base.config.hidden_size,
        vocab_size=model.base.config.vocab_size,
        cross_links=run.cross_links,
        reads_token=run.reads_token,
        own_lm_heads=run.own_lm_heads,
        draft_vocab_size=_draft_vocab_size(model),
        base_name=Path(run.model).name,
        base_fingerprint=base_model.fingerprint(folder),
        entropy_threshold=threshold,
        accepted_per_step=_self_test_acceptance(model, test),
    )
    checkpoint.save(run.output, config, model.heads.to(SAVED_DTYPE), test)
    card.write_figures(run.output, figures)
    logger.info("Heads saved to %s: %s", run.output, figures)
    return figures


def _draft_vocab_size(model: FrozenBaseWithHeads) -> int:
    ids = model.heads.draft_token_ids
    return model.base.config.vocab_size if ids is None else len(ids)


@torch.no_grad()
def _self_test_acceptance(model: FrozenBaseWithHeads, test: checkpoint.SelfTest) -> float:
    heads = copy.deepcopy(model.heads).to(SAVED_DTYPE)
    embedding = model.base.get_input_embeddings().weight.to(SAVED_DTYPE)
    lm_head = model.base.lm_head.weight.to(SAVED_DTYPE)
    drafts = checkpoint.best_drafts(heads, test, lm_head, embedding)
    return round(test.accepted(drafts.cpu()), 4)
