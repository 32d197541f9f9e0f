"""What a checkpoint needs to know of the model it was trained on, read from its files.

Reads safetensors only, and of them only what is asked: a fingerprint costs one row per
tensor, whatever the size of the model.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_accel.errors import CheckpointError

_EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_LM_HEAD_NAMES = ("lm_head.weight", *_EMBEDDING_NAMES)


def fingerprint(folder: Path) -> str:
    """Identity of a model's weights: 16 hex digits.

    Covers name, shape and first row (as bfloat16) of every tensor, so a float32 and a
    bfloat16 copy share it and a fine-tuned model does not.

    Raises:
        CheckpointError: the folder holds no readable safetensors.
    """
    digest = hashlib.sha256()
    for file, name in _tensors(folder):
        with _opened(file) as weights:
            part = weights.get_slice(name)
            shape = part.get_shape()
            row = part[:1] if shape else weights.get_tensor(name)
        digest.update(f"{name} {list(shape)} ".encode())
        digest.update(row.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def lm_head_weight(folder: Path) -> Tensor:
    """[vocab, hidden_size], the matrix that turns hidden states into logits.

    Raises:
        CheckpointError: no tensor has a name an LM head or tied embedding goes by.
    """
    return _matrix(folder, "LM head", _LM_HEAD_NAMES)


def embedding_weight(folder: Path) -> Tensor:
    """[vocab, hidden_size], the matrix whose rows stand for tokens.

    Raises:
        CheckpointError: no tensor has a name an embedding goes by.
    """
    return _matrix(folder, "embedding", _EMBEDDING_NAMES)


def _matrix(folder: Path, what: str, names: tuple[str, ...]) -> Tensor:
    tensors = _tensors(folder)
    for wanted in names:
        for file, name in tensors:
            if name.endswith(wanted):
                with _opened(file) as weights:
                    matrix: Tensor = weights.get_tensor(name)
                    return matrix
    raise CheckpointError(
        f"No {what} in {folder}: expected a tensor named {' or '.join(names)}; set "
        "check_base=false to serve without checking against it."
    )


def _tensors(folder: Path) -> list[tuple[Path, str]]:
    """(file, tensor name) of every tensor, sorted by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _weight_map(index)
        return sorted(((folder / f, n) for n, f in names.items()), key=lambda t: t[1])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"No *.safetensors in model folder {folder}: expected the weights it was "
            "trained on; convert the model, or set check_base=false."
        )
    found = []
    for file in files:
        with _opened(file) as weights:
            found += [(file, name) for name in weights.keys()]  # noqa: SIM118  not a dict
    return sorted(found, key=lambda t: t[1])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files ({error!r}): expected a "
            "'weight_map' of tensor names to files; download the model again."
        ) from error


@contextmanager
def _opened(file: Path) -> Iterator["safe_open"]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}): expected the model's "
            "weights; download it again."
        ) from error
