"""An exit on disk: `config.json`, `model.safetensors`, `self_test.safetensors`.

The weights are the adapter's; an exit without one is its layer and its self-test.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_accel.errors import CheckpointError
from vllm_accel.free.exit_head import ADAPTERS, ExitAdapter
from vllm_accel.on_disk import base_model, files

FORMAT = "vllm_accel.free.1"
MAX_LAYERS = 2**12
MAX_ADAPTER_WIDTH = 2**16
_KIND = files.Kind("free", "exit", FORMAT)
_MIN_BASE_AGREEMENT = 0.9
_MAX_ADAPTER_ERROR = 0.05  # of what it adds; rounding to bfloat16 gives about 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitConfig:
    """`config.json` of an exit's folder."""

    format: str
    exit_layer: int
    """L_S, decoder layers a token runs before it may exit."""
    num_layers: int
    """L_D, decoder layers of the model."""
    hidden_size: int
    vocab_size: int
    adapter: str
    """One of `exit_head.ADAPTERS`."""
    adapter_width: int
    """Numbers in the adapter's middle, 0 without one."""
    base_name: str
    """Name of the model the exit belongs to, for people."""
    base_fingerprint: str
    """`base_model.fingerprint` of that model."""
    threshold: float
    """Confidence above which 99 % of exits agreed with the deep layers on held-out text;
    1 if none did."""
    agreement: float
    """Share of the self-test's tokens where shallow and deep first choice are one."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Exit states of the model, what the exit makes of them, and both first choices."""

    exit_states: Tensor  # [rows, hidden_size] after `exit_layer` layers
    updates: Tensor  # [rows, hidden_size] what the adapter adds to them
    normed_states: Tensor  # [rows, hidden_size] after the final norm, for the LM head
    token_ids: Tensor  # [rows, 2] int32: the shallow model's first choice, the deep one's

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        adapter: ExitAdapter,
        exit_states: Tensor,  # [rows, hidden_size]
        normed_states: Tensor,  # [rows, hidden_size]
        token_ids: Tensor,  # [rows, 2]
    ) -> "SelfTest":
        """A self-test of an adapter as it will be saved: in bfloat16."""
        return cls(exit_states, _updates(adapter, exit_states), normed_states, token_ids)

    def agreement(self) -> float:
        """Share of tokens where the two first choices are one."""
        return float(self.token_ids[:, 0].eq(self.token_ids[:, 1]).float().mean())


def save(folder: Path, config: ExitConfig, adapter: ExitAdapter, test: SelfTest) -> None:
    """Writes an exit's folder; `load` gives the same back."""
    tensors = {name: getattr(test, name) for name in _widths(config)}
    files.write(folder, config, adapter.state_dict(), tensors)


def load_config(folder: Path) -> ExitConfig:
    """The checked `config.json` of an exit's folder.

    Raises:
        CheckpointError: it is missing, not JSON, or says something impossible.
    """
    values = files.config_values(_KIND, folder)
    file = folder / files.CONFIG
    files.check_values(_KIND, file, values, ExitConfig)
    files.check_ranges(_KIND, file, values, {"num_layers": (2, MAX_LAYERS)})
    ranges = {
        "exit_layer": (1, values["num_layers"] - 1),
        "hidden_size": (1, 2**20),
        "vocab_size": (2, 2**31),
        "threshold": (0.0, 1.0),
        "agreement": (0.0, 1.0),
    }
    files.check_ranges(_KIND, file, values, ranges)
    _check_adapter(file, values)
    return ExitConfig(**values)


def _check_adapter(file: Path, values: dict[str, Any]) -> None:
    kind = values["adapter"]
    if kind not in ADAPTERS:
        raise CheckpointError(
            f"{file}: adapter={kind!r} is not known: expected {', '.join(ADAPTERS)}; copy "
            "the exit again."
        )
    widths = (0, 0) if kind == "none" else (1, MAX_ADAPTER_WIDTH)
    files.check_ranges(_KIND, file, values, {"adapter_width": widths})


def load(folder: Path) -> tuple[ExitConfig, ExitAdapter]:
    """An exit's config and adapter, the latter in the float type it was saved in.

    Raises:
        CheckpointError: a file is missing or broken, or shapes are not what the config
            says.
    """
    config = load_config(folder)
    state = files.load_tensors(folder / files.WEIGHTS)
    with torch.device("meta"):  # shapes only, until they are known to be right
        adapter = ExitAdapter(config.adapter, config.hidden_size, config.adapter_width)
    files.check_state(_KIND, folder, adapter.state_dict(), state)
    adapter.load_state_dict(state, assign=True)
    return config, adapter.requires_grad_(False)


def check_shape(
    folder: Path,
    config: ExitConfig,
    *,
    num_layers: int,
    hidden_size: int,
    vocab_size: int,
) -> None:
    """Refuses an exit of a model of another shape, for where weights are not compared.

    Raises:
        CheckpointError: naming both shapes.
    """
    has = (config.num_layers, config.hidden_size, config.vocab_size)
    model = (num_layers, hidden_size, vocab_size)
    if has != model:
        raise CheckpointError(
            f"Exit {folder} is of a model with {_shape(has)}, this one has "
            f"{_shape(model)}: expected the same; use an exit trained on this model."
        )


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers, hidden size {shape[1]}, vocabulary {shape[2]}"


def check_against_base(folder: Path, base: Path) -> float:
    """Share of the self-test's tokens on which shallow and deep model agree.

    Raises:
        CheckpointError: the exit belongs to another model, or does not work as it did
            when it was trained.
    """
    config, adapter = load(folder)
    found = base_model.fingerprint(base)
    if found != config.base_fingerprint:
        raise CheckpointError(
            f"Exit {folder} was trained on {config.base_name!r} (fingerprint "
            f"{config.base_fingerprint}), not on {base} ({found}): expected the same "
            "weights; use an exit trained on this model, or set free.check_base=false for "
            "a quantised copy of it."
        )
    test = SelfTest(**files.load_self_test(_KIND, folder, _widths(config)))
    _run_self_test(folder, adapter, test, base_model.lm_head_weight(base))
    return test.agreement()


@torch.no_grad()
def _run_self_test(
    folder: Path, adapter: ExitAdapter, test: SelfTest, lm_head: Tensor
) -> None:
    """Adapter and LM head are tried apart: between them is a norm of any kind."""
    off = (_updates(adapter, test.exit_states) - test.updates.float()).norm()
    size = test.updates.float().norm()
    said = (test.normed_states.float() @ lm_head.float().T).argmax(dim=-1)
    agreement = float(said.eq(test.token_ids[:, 0]).float().mean())
    # A NaN is not small either.
    if not off <= _MAX_ADAPTER_ERROR * size or agreement < _MIN_BASE_AGREEMENT:
        raise CheckpointError(
            f"Exit {folder} fails its self-test: the adapter is off by {off:.2g} of "
            f"{size:.2g} (expected at most {_MAX_ADAPTER_ERROR:.0%}), the LM head agrees "
            f"on {agreement:.0%} of tokens (expected at least "
            f"{_MIN_BASE_AGREEMENT:.0%}); the files are damaged or of another model, train "
            "or copy them again."
        )


def _widths(config: ExitConfig) -> dict[str, tuple[int, ...]]:
    states = ("exit_states", "updates", "normed_states")
    return {**dict.fromkeys(states, (config.hidden_size,)), "token_ids": (2,)}


def _updates(adapter: ExitAdapter, exit_states: Tensor) -> Tensor:
    """[rows, hidden_size] float32, of states and weights as bfloat16 holds them."""
    exact = copy.deepcopy(adapter).bfloat16().float()
    states = exit_states.bfloat16().float()
    updates: Tensor = exact(states) - states
    return updates
