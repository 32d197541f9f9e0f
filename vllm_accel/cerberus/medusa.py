"""Medusa checkpoints: those of FasterDecoding read, vLLM's own format written.

FasterDecoding (github.com/FasterDecoding/Medusa): `config.json` with `medusa_num_heads`
and `medusa_num_layers`, weights `HEAD.LAYER.linear.{weight,bias}` and one LM head per
head. vLLM 0.32 (vllm/model_executor/models/medusa.py): `blocks.HEAD.layers.LAYER.*` and
`lm_head.weight` or `lm_heads.HEAD.weight`; 0.33 no longer has it.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.errors import CheckpointError

_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


def is_medusa(values: Any) -> bool:
    """Whether a `config.json` is FasterDecoding's."""
    return isinstance(values, dict) and "medusa_num_heads" in values


def read(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shapes and weights of a FasterDecoding checkpoint, named as ours.

    Args:
        folder: holds the weights.
        values: its `config.json`.

    Returns:
        Keyword arguments of `CerberusHeads`, and its state.

    Raises:
        CheckpointError: weights are missing, damaged, or not of that format.
    """
    weights = _weights(folder)
    heads, layers = values["medusa_num_heads"], values.get("medusa_num_layers", 1)
    try:
        blocks = range(layers)
        state = {
            f"{ours}.{j}": torch.stack(
                [weights[f"{i}.{j}.linear.{theirs}"] for i in range(heads)]
            )
            for j in blocks
            for ours, theirs in (("weights", "weight"), ("biases", "bias"))
        }
        state["lm_heads"] = torch.stack(
            [weights[f"{i}.{layers}.weight"] for i in range(heads)]
        )
        _, vocab_size, hidden_size = state["lm_heads"].shape
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} does not hold {heads!r} Medusa heads of {layers!r} layers "
            f"({error}): expected weights like '0.0.linear.weight' and '0.1.weight'; copy "
            "the heads again."
        ) from error
    shapes = {
        "draft_tokens": heads,
        "blocks": layers,
        "hidden_size": hidden_size,
        "cross_links": False,
        "reads_token": False,
        "vocab_size": vocab_size,
        "own_lm_heads": True,
    }
    return shapes, state


def _weights(folder: Path) -> dict[str, Tensor]:
    for file in (folder / name for name in _FILES):
        if file.is_file():
            weights = _read_file(file)
            return {name.removeprefix("medusa_head."): w for name, w in weights.items()}
    raise CheckpointError(
        f"No Medusa weights in {folder}: expected {' or '.join(_FILES)} beside its "
        "config.json; copy the heads again."
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            weights: dict[str, Tensor] = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise CheckpointError(
            f"{file} is damaged ({reason}): expected weights and nothing else; copy the "
            "heads again."
        ) from e
    return weights


def write_for_vllm(folder: Path, heads: CerberusHeads, lm_head: Tensor) -> None:
    """Writes heads without cross-links as vLLM's method `medusa` loads them.

    Args:
        folder: made if missing.
        heads: drafting every token of the vocabulary.
        lm_head: [vocab, hidden_size] the target's; stored once if heads share it.
    """
    vocab_size, hidden_size = lm_head.shape
    state = {
        f"blocks.{i}.layers.{j}.{name}": parameter[i]
        for name, stacks in (("weight", heads.weights), ("bias", heads.biases))
        for j, parameter in enumerate(stacks)
        for i in range(heads.draft_tokens)
    }
    if heads.lm_heads is None:
        state["lm_head.weight"] = lm_head
    else:
        state |= {f"lm_heads.{i}.weight": w for i, w in enumerate(heads.lm_heads)}
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_heads": heads.draft_tokens,
        "num_hidden_layers": len(heads.weights),
        "medusa_fc_bias": True,
        "original_lm_head": heads.lm_heads is None,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().bfloat16().contiguous() for name, w in state.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
