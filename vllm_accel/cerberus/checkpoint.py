"""Heads on disk: a folder with `config.json`, `model.safetensors`, `self_test.safetensors`.

Everything is checked before an engine starts, because heads that do not fit their model
fail silently otherwise: every draft is rejected and serving is merely slow.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_accel.cerberus import base_model, medusa
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "vllm_accel.cerberus.1"
MAX_BLOCKS = 8
UNKNOWN_BASE = "unknown"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_as_saved(heads), folder / "model.safetensors")
    save_file(
        {
            "hidden_states": test.hidden_states.bfloat16().contiguous(),
            "token_ids": test.token_ids.int().contiguous(),
        },
        folder / "self_test.safetensors",
    )
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / "config.json").write_text(text + "\n")


def _as_saved(heads: CerberusHeads) -> dict[str, Tensor]:
    return {
        name: (value.bfloat16() if value.is_floating_point() else value.int()).contiguous()
        for name, value in heads.state_dict().items()
    }


def load_config(folder: Path) -> HeadsConfig:
    """The checked `config.json` of a heads folder.

    Raises:
        CheckpointError: it is missing, not JSON, or says something impossible.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"No heads in {folder}: expected config.json and model.safetensors written by "
            "`vllm-accel train cerberus`; name the folder of heads with the key 'model'."
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}): expected the file `vllm-accel train cerberus` "
            "wrote; copy the heads again."
        ) from error
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
    values = json.loads((folder / "config.json").read_text())
    if medusa.is_medusa(values):
        _, state = medusa.read(folder, values)
    else:
        state = load_tensors(folder / "model.safetensors")
    with torch.device("meta"):  # shapes only, until they are known to be right
        heads = empty_heads(config)
    _check_state(folder, heads.state_dict(), state)
    _check_token_ids(folder, state.get("draft_token_ids"), config.vocab_size)
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
    return _run_self_test(folder, config, heads, base_model.lm_head_weight(base))


def _run_self_test(
    folder: Path, config: HeadsConfig, heads: CerberusHeads, lm_head: Tensor
) -> float:
    test = _load_self_test(folder, config)
    matrix = lm_head.float()
    said = (test.hidden_states @ matrix.T).argmax(dim=-1)
    agreement = float(said.eq(test.token_ids[:, 0]).float().mean())
    accepted = test.accepted(best_drafts(heads.float(), test.hidden_states, matrix))
    expected = config.accepted_per_step
    if agreement < _MIN_BASE_AGREEMENT or accepted < _MIN_ACCEPTANCE_SHARE * expected:
        raise CheckpointError(
            f"Heads {folder} fail their self-test: {accepted:.2f} drafts accepted per step "
            f"(expected {expected:.2f}), LM head agrees on {agreement:.0%} of tokens "
            f"(expected at least {_MIN_BASE_AGREEMENT:.0%}); the files are damaged or of "
            "another model, train or copy them again."
        )
    return accepted


def best_drafts(heads: CerberusHeads, hidden_states: Tensor, lm_head: Tensor) -> Tensor:
    """[draft_tokens, n] token ids; hidden_states: [n, hidden_size]."""
    rows = heads.draftable_rows(lm_head)
    logits = heads.logits(heads(hidden_states), lambda states: states @ rows.T)
    return heads.token_ids(logits.argmax(dim=-1))


def _load_self_test(folder: Path, config: HeadsConfig) -> SelfTest:
    file = folder / "self_test.safetensors"
    tensors = load_tensors(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = next(iter(shapes.get("hidden_states", ())), 0)
    expected = {
        "hidden_states": (rows, config.hidden_size),
        "token_ids": (rows, 1 + config.draft_tokens),
    }
    if shapes != expected or rows == 0:
        raise CheckpointError(
            f"{file} holds {shapes}: expected hidden_states and token_ids, a row of each "
            "per tried token, as wide as config.json says; copy the heads again."
        )
    return SelfTest(tensors["hidden_states"].float(), tensors["token_ids"])


def _checked_config(file: Path, values: Any) -> HeadsConfig:
    fields = {field.name: field.type for field in dataclasses.fields(HeadsConfig)}
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(
            f"{file} has format {got!r}: expected {FORMAT!r}; train the heads with this "
            "version of vllm-accel."
        )
    if values.keys() != fields.keys():
        missing = sorted(fields.keys() - values.keys())
        unknown = sorted(values.keys() - fields.keys())
        raise CheckpointError(
            f"{file} does not have the expected keys (missing {missing}, unknown "
            f"{unknown}): expected {sorted(fields)}; copy the heads again."
        )
    for key, kind in fields.items():
        if type(values[key]) is not kind:
            raise CheckpointError(
                f"{file}: {key}={values[key]!r} is a {type(values[key]).__name__}, "
                f"expected {kind.__name__}; copy the heads again."  # type: ignore[union-attr]
            )
    _check_range(file, values, "draft_tokens", 1, MAX_DRAFT_TOKENS)
    _check_range(file, values, "blocks", 1, MAX_BLOCKS)
    _check_range(file, values, "hidden_size", 1, 2**20)
    _check_range(file, values, "vocab_size", 1, 2**31)
    _check_range(file, values, "draft_vocab_size", 1, values["vocab_size"])
    _check_range(file, values, "entropy_threshold", 0.0, 1e3)
    _check_range(file, values, "accepted_per_step", 0.0, MAX_DRAFT_TOKENS)
    return HeadsConfig(**values)


def _check_range(
    file: Path, values: dict[str, Any], key: str, least: float, most: float
) -> None:
    if not least <= values[key] <= most:
        raise CheckpointError(
            f"{file}: {key}={values[key]} is out of range: expected {least:g}..{most:g}; "
            "copy the heads again."
        )


def _check_state(
    folder: Path, expected: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    for name in sorted(expected.keys() | state.keys()):
        want = list(expected[name].shape) if name in expected else "no such tensor"
        got = list(state[name].shape) if name in state else "no such tensor"
        if want != got:
            raise CheckpointError(
                f"{folder}/model.safetensors: tensor {name!r} has {got}, expected {want} "
                "by config.json; the two files do not belong together, copy both again."
            )
        dtype = state[name].dtype
        if name == "draft_token_ids" and dtype == torch.int32:
            continue
        if dtype not in _FLOATS or not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"{folder}/model.safetensors: tensor {name!r} ({dtype}) holds no usable "
                "weights: expected finite bfloat16, float16 or float32; train or copy the "
                "heads again."
            )


def _check_token_ids(folder: Path, ids: Tensor | None, vocab_size: int) -> None:
    if ids is None:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"{folder}/model.safetensors: draft_token_ids go from {int(ids.min())} to "
            f"{int(ids.max())}: expected ids of a vocabulary of {vocab_size}; copy the "
            "heads again."
        )


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is missing or damaged ({error}): expected a safetensors file written "
            "by `vllm-accel train cerberus`; copy the heads again."
        ) from error
    return tensors
