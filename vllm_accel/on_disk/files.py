"""`config.json` and safetensors of a checkpoint, every malformed case refused.

Everything is checked before an engine starts, because what does not fit its model fails
silently otherwise: every draft is rejected and serving is merely slow.
"""

import dataclasses
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_accel.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SELF_TEST = "self_test.safetensors"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Kind:
    """A method's checkpoints, for what is said about them."""

    method: str
    """The method, as in `vllm-accel train METHOD`."""
    noun: str
    """What a checkpoint holds, such as "heads"."""
    format: str
    """What `format` is in its `config.json`."""


def write(
    folder: Path,
    config: Any,
    weights: Mapping[str, Tensor],
    self_test: Mapping[str, Tensor],
) -> None:
    """Writes a checkpoint; floating weights as bfloat16, whole numbers as int32.

    Args:
        folder: made if missing.
        config: a dataclass of plain JSON values.
        weights: what is trained.
        self_test: tensors to try the weights on wherever they are loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_as_saved(weights), folder / WEIGHTS)
    save_file(_as_saved(self_test), folder / SELF_TEST)
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / CONFIG).write_text(text + "\n")


def _as_saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.bfloat16() if value.is_floating_point() else value.int()).contiguous()
        for name, value in tensors.items()
    }


def config_values(kind: Kind, folder: Path) -> Any:
    """What a checkpoint's `config.json` says, not looked at yet.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"No {kind.noun} in {folder}: expected {CONFIG} and {WEIGHTS} written by "
            f"`vllm-accel train {kind.method}`; name the folder of {kind.noun} with the "
            "key 'model'."
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}): expected the file `vllm-accel train "
            f"{kind.method}` wrote; copy the {kind.noun} again."
        ) from error


def check_values(kind: Kind, file: Path, values: Any, config: type[Any]) -> None:
    """Refuses another format, keys other than `config` has fields, and wrong types.

    Raises:
        CheckpointError: naming the first thing wrong.
    """
    if not isinstance(values, dict) or values.get("format") != kind.format:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(
            f"{file} has format {got!r}: expected {kind.format!r}; train the {kind.noun} "
            "with this version of vllm-accel."
        )
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(config)}
    if values.keys() != fields.keys():
        missing = sorted(fields.keys() - values.keys())
        unknown = sorted(values.keys() - fields.keys())
        raise CheckpointError(
            f"{file} does not have the expected keys (missing {missing}, unknown "
            f"{unknown}): expected {sorted(fields)}; copy the {kind.noun} again."
        )
    for key, wanted in fields.items():
        if type(values[key]) is not wanted:
            raise CheckpointError(
                f"{file}: {key}={values[key]!r} is a {type(values[key]).__name__}, "
                f"expected {wanted.__name__}; copy the {kind.noun} again."
            )


def check_ranges(
    kind: Kind,
    file: Path,
    values: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Refuses a value outside its range, ends included.

    Raises:
        CheckpointError: naming the first one.
    """
    for key, (least, most) in ranges.items():
        if not least <= values[key] <= most:
            raise CheckpointError(
                f"{file}: {key}={values[key]} is out of range: expected "
                f"{least:g}..{most:g}; copy the {kind.noun} again."
            )


def check_state(
    kind: Kind,
    folder: Path,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    token_ids: Container[str] = (),
) -> None:
    """Refuses weights of other names or shapes than expected, or without a use.

    Args:
        token_ids: tensors of whole numbers; every other one is to be floating.

    Raises:
        CheckpointError: naming the first one.
    """
    file = folder / WEIGHTS
    for name in sorted(expected.keys() | state.keys()):
        want = list(expected[name].shape) if name in expected else "no such tensor"
        got = list(state[name].shape) if name in state else "no such tensor"
        if want != got:
            raise CheckpointError(
                f"{file}: tensor {name!r} has {got}, expected {want} by {CONFIG}; the two "
                "files do not belong together, copy both again."
            )
        dtype = state[name].dtype
        if name in token_ids and dtype == torch.int32:
            continue
        if dtype not in _FLOATS or not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"{file}: tensor {name!r} ({dtype}) holds no usable weights: expected "
                "finite bfloat16, float16 or float32; train or copy the "
                f"{kind.noun} again."
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
            "by `vllm-accel train`; copy its folder again."
        ) from error
    return tensors


def load_self_test(
    kind: Kind, folder: Path, widths: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of a self-test, which have a row each per tried token.

    Args:
        widths: per tensor, its shape without the rows.

    Raises:
        CheckpointError: there are others, of other shapes, or none at all.
    """
    file = folder / SELF_TEST
    tensors = load_tensors(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = next((shape[0] for shape in shapes.values() if shape), 0)
    if rows == 0 or shapes != {name: (rows, *width) for name, width in widths.items()}:
        raise CheckpointError(
            f"{file} holds {shapes}: expected {' and '.join(widths)}, a row of each per "
            f"tried token, as wide as {CONFIG} says; copy the {kind.noun} again."
        )
    return tensors
