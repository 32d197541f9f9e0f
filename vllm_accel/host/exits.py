"""Which trained exit an engine uses, and what it decides."""

import dataclasses
from pathlib import Path
from typing import Any

from vllm_accel.config import FreeConfig
from vllm_accel.errors import ConfigError
from vllm_accel.free import checkpoint
from vllm_accel.free.gates import Learning, make_gate
from vllm_accel.gating.beta_mixture import INITIAL_THRESHOLD
from vllm_accel.on_disk import location


def folder_of(config: FreeConfig, model_config: Any) -> Path | None:
    """Local folder of the exit; None where the model alone is cut.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    folder = location.method_folder(
        "free",
        config.model,
        base=model_config.model,
        revision=None if config.model else model_config.revision,
    )
    return folder if config.model or folder.is_dir() else None


def with_exit(config: FreeConfig, model_config: Any) -> FreeConfig:
    """The config with what its exit decides filled in, after checking it.

    Raises:
        CheckpointError: the exit is broken or of another model.
        ConfigError: nothing says where the exit is, or it is outside of the model.
    """
    num_layers = model_config.get_total_num_hidden_layers()
    folder = folder_of(config, model_config)
    if folder is None:
        exit_layer, threshold = config.exit_layer, INITIAL_THRESHOLD
    else:
        trained = _checked(folder, config, model_config, num_layers)
        exit_layer, threshold = trained.exit_layer, trained.threshold
    if exit_layer is None:
        raise ConfigError(
            f"free.exit_layer is not set and {model_config.model} has no folder 'free': "
            f"expected 1..{num_layers - 1}, or a trained exit; a quarter of the layers is "
            "a good start."
        )
    if exit_layer >= num_layers:
        raise ConfigError(
            f"free.exit_layer={exit_layer} is not inside the model: expected "
            f"1..{num_layers - 1}; a quarter of the layers is a good start."
        )
    chosen = threshold if config.threshold is None else config.threshold
    gate = config.gate_in_use
    make_gate(
        gate,
        draft_tokens=config.num_speculative_tokens,
        threshold=chosen,
        learning=learning_of(config),
    )
    begins = chosen if gate in ("threshold", "quality") else None
    return dataclasses.replace(config, exit_layer=exit_layer, threshold=begins, gate=gate)


def learning_of(config: FreeConfig) -> Learning:
    """What the config says of the gate "beta_mixture"."""
    return Learning(config.max_updates, config.min_observations, config.decay)


def _checked(
    folder: Path, config: FreeConfig, model_config: Any, num_layers: int
) -> checkpoint.ExitConfig:
    trained, _ = checkpoint.load(folder)
    if config.check_base:
        base = location.model_folder(model_config.model, model_config.revision)
        checkpoint.check_against_base(folder, base)
    checkpoint.check_shape(
        folder,
        trained,
        num_layers=num_layers,
        hidden_size=model_config.get_hidden_size(),
        vocab_size=model_config.get_vocab_size(),
    )
    if config.exit_layer not in (None, trained.exit_layer):
        raise ConfigError(
            f"free.exit_layer={config.exit_layer} is not where the exit {folder} was "
            f"trained: expected {trained.exit_layer}; leave it out, or name another exit "
            "with 'model'."
        )
    return trained
