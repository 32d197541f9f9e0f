"""Heads on disk: a folder with `config.json`, `model.safetensors`, `self_test.safetensors`.

Medusa checkpoints of FasterDecoding are read as well.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_accel.cerberus import medusa
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import CheckpointError
from vllm_accel.on_disk import base_model, files

logger = logging.getLogger(__name__)

FORMAT = "vllm_accel.cerberus.1"
MAX_BLOCKS = 8
UNKNOWN_BASE = "unknown"
_KIND = files.Kind("cerberus", "heads", FORMAT)
_MIN_BASE_AGREEMENT = 0.9
_MIN_ACCEPTANCE_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """`config.json` of a heads folder."""

    format: str
    draft_tokens: int
    """K, number of heads."""
    blocks: int
    """J, residual blocks per head."""
    hidden_size: int
    vocab_size: int
    cross_links: bool
    reads_token: bool
    """Heads also read the next token's embedding."""
    own_lm_heads: bool
    """Heads have LM heads of their own; otherwise they use the target's."""
    draft_vocab_size: int
    """Tokens that can be drafted, at most `vocab_size`."""
    base_name: str
    """Name of the model the heads were trained on, for people."""
    base_fingerprint: str
    """`base_model.fingerprint` of that model."""
    entropy_threshold: float
    """Nats below which drafting paid on held-out text."""
    accepted_per_step: float
    """Mean drafts accepted per step on the self-test, by chain drafting."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Hidden states of the base model and the tokens it went on to say."""

    hidden_states: Tensor  # [rows, hidden_size]
    token_ids: Tensor  # [rows, 1 + draft_tokens] int32: next token, then the drafts'

    def accepted(self, drafts: Tensor) -> float:
        """Mean length of the drafts' agreeing prefix; drafts: [draft_tokens, rows]."""
        agree = drafts.T.eq(self.token_ids[:, 1:]).to(torch.int32)
        return float(agree.cumprod(dim=1).sum(dim=1).float().mean())


def save(folder: Path, config: HeadsConfig, heads: CerberusHeads, test: SelfTest) -> None:
    """Writes a heads folder; `load` gives the same back."""
    tensors = {"hidden_states": test.hidden_states, "token_ids": test.token_ids}
    files.write(folder, config, heads.state_dict(), tensors)


def load_config(folder: Path) -> HeadsConfig:
    """The checked `config.json` of a heads folder.

    Raises:
        CheckpointError: it is missing, not JSON, or says something impossible.
    """
    values = files.config_values(_KIND, folder)
    file = folder / files.CONFIG
    if medusa.is_medusa(values):
        name = str(values.get("base_model_name_or_path", ""))
        return _medusa_config(file, medusa.read(folder, values)[0], name)
    return _checked_config(file, values)


def _medusa_config(file: Path, shapes: dict[str, Any], base_name: str) -> HeadsConfig:
    """What is known of heads trained elsewhere: shapes, no fingerprint of their model."""
    values = {
        "format": FORMAT,
        "draft_vocab_size": shapes["vocab_size"],
        "base_name": base_name,
        "base_fingerprint": UNKNOWN_BASE,
        "entropy_threshold": math.log(shapes["vocab_size"]),
        "accepted_per_step": 0.0,
    }
    return _checked_config(file, values | shapes)


def load(folder: Path) -> tuple[HeadsConfig, CerberusHeads]:
    """Heads and their config, in the float type they were saved in.

    Raises:
        CheckpointError: a file is missing or broken, or shapes are not what the config
            says.
    """
    config = load_config(folder)
    values = files.config_values(_KIND, folder)
    if medusa.is_medusa(values):
        _, state = medusa.read(folder, values)
    else:
        state = files.load_tensors(folder / files.WEIGHTS)
    with torch.device("meta"):  # shapes only, until they are known to be right
        heads = empty_heads(config)
    files.check_state(_KIND, folder, heads.state_dict(), state, ("draft_token_ids",))
    drafted = f"{folder / files.WEIGHTS}: draft_token_ids"
    _check_token_ids(drafted, state.get("draft_token_ids"), config.vocab_size)
    heads.load_state_dict(state, assign=True)
    return config, heads.requires_grad_(False)


def empty_heads(config: HeadsConfig) -> CerberusHeads:
    """Heads of a config's shapes, all zeros."""
    limited = config.draft_vocab_size < config.vocab_size
    return CerberusHeads(
        draft_tokens=config.draft_tokens,
        blocks=config.blocks,
        hidden_size=config.hidden_size,
        cross_links=config.cross_links,
        reads_token=config.reads_token,
        vocab_size=config.vocab_size,
        own_lm_heads=config.own_lm_heads,
        draft_vocab_size=config.draft_vocab_size if limited else None,
    )


def check_against_base(folder: Path, base: Path) -> float:
    """Accepted drafts per step on the self-test, with the base model's own LM head.

    Raises:
        CheckpointError: the heads belong to another model, or do not draft for this one
            as they did when they were trained.
    """
    config, heads = load(folder)
    if config.base_fingerprint == UNKNOWN_BASE:
        logger.warning(
            "Heads %s hold no fingerprint of their model (they name %r): not checked",
            folder,
            config.base_name,
        )
        return 0.0
    found = base_model.fingerprint(base)
    if found != config.base_fingerprint:
        raise CheckpointError(
            f"Heads {folder} were trained on {config.base_name!r} (fingerprint "
            f"{config.base_fingerprint}), not on {base} ({found}): expected the same "
            "weights; use heads trained on this model, or set cerberus.check_base=false "
            "for a quantised copy of it."
        )
    return _run_self_test(folder, config, heads, base)


def _run_self_test(
    folder: Path, config: HeadsConfig, heads: CerberusHeads, base: Path
) -> float:
    test = _load_self_test(folder, config)
    matrix = base_model.lm_head_weight(base).float()
    embedding = base_model.embedding_weight(base) if heads.reads_token else None
    said = (test.hidden_states @ matrix.T).argmax(dim=-1)
    agreement = float(said.eq(test.token_ids[:, 0]).float().mean())
    accepted = test.accepted(best_drafts(heads.float(), test, matrix, embedding))
    expected = config.accepted_per_step
    if agreement < _MIN_BASE_AGREEMENT or accepted < _MIN_ACCEPTANCE_SHARE * expected:
        raise CheckpointError(
            f"Heads {folder} fail their self-test: {accepted:.2f} drafts accepted per step "
            f"(expected {expected:.2f}), LM head agrees on {agreement:.0%} of tokens "
            f"(expected at least {_MIN_BASE_AGREEMENT:.0%}); the files are damaged or of "
            "another model, train or copy them again."
        )
    return accepted


def best_drafts(
    heads: CerberusHeads, test: SelfTest, lm_head: Tensor, embedding: Tensor | None
) -> Tensor:
    """[draft_tokens, n] token ids for the n lines of a self-test.

    Args:
        embedding: [vocab, hidden_size]; None for heads that do not read tokens.
    """
    rows = heads.draftable_rows(lm_head)
    states = test.hidden_states.to(heads.weights[0])
    next_ids = test.token_ids[:, 0].long().to(states.device)
    tokens = None if embedding is None else embedding[next_ids].to(states)
    logits = heads.logits(heads(states, tokens), lambda said: said @ rows.T)
    return heads.token_ids(logits.argmax(dim=-1))


def _load_self_test(folder: Path, config: HeadsConfig) -> SelfTest:
    widths = {
        "hidden_states": (config.hidden_size,),
        "token_ids": (1 + config.draft_tokens,),
    }
    tensors = files.load_self_test(_KIND, folder, widths)
    said = f"{folder}: token_ids of the self-test"
    _check_token_ids(said, tensors["token_ids"], config.vocab_size)
    return SelfTest(tensors["hidden_states"].float(), tensors["token_ids"])


def _checked_config(file: Path, values: Any) -> HeadsConfig:
    files.check_values(_KIND, file, values, HeadsConfig)
    ranges = {
        "draft_tokens": (1, MAX_DRAFT_TOKENS),
        "blocks": (1, MAX_BLOCKS),
        "hidden_size": (1, 2**20),
        "vocab_size": (1, 2**31),
        "draft_vocab_size": (1, values["vocab_size"]),
        "entropy_threshold": (0.0, 1e3),
        "accepted_per_step": (0.0, MAX_DRAFT_TOKENS),
    }
    files.check_ranges(_KIND, file, values, ranges)
    return HeadsConfig(**values)


def _check_token_ids(what: str, ids: Tensor | None, vocab_size: int) -> None:
    if ids is None:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"{what} go from {int(ids.min())} to "
            f"{int(ids.max())}: expected ids of a vocabulary of {vocab_size}; copy the "
            "heads again."
        )
