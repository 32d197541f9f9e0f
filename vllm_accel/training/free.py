"""`vllm-accel train free`: an exit for a model, by transformers' Trainer."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_accel.errors import ConfigError
from vllm_accel.free import checkpoint
from vllm_accel.free.exit_head import ADAPTERS, ExitAdapter
from vllm_accel.on_disk import base_model
from vllm_accel.training import card, distillation, evaluate, exit_figures, runs
from vllm_accel.training.exit_figures import ExitObservations
from vllm_accel.training.precision import SAVED_DTYPE, fast_dtype, round_as_saved
from vllm_accel.training.shallow_deep import ShallowDeep

logger = logging.getLogger(__name__)

EXIT_FOLDER = "free"
"""Folder of the exit in a model that was trained with it."""

_MODEL_LEARNING_RATE = 1e-4  # FREE's scripts
_ADAPTER_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRun(runs.Run):
    """What `train free` is asked for; the command line's options, one to one."""

    exit_layer: int
    kd: str = "dyna"
    kd_weight: float = 0.5
    freeze_base: bool = False
    adapter: str = "auto"
    """"auto" becomes an MLP on a frozen base and nothing otherwise."""
    adapter_width: int = 256
    targets: str = "data"
    learning_rate: float = 0.0
    """0 becomes 1e-4 for the whole model and 1e-3 for an adapter alone."""

    def __post_init__(self) -> None:
        if self.adapter == "auto":
            object.__setattr__(self, "adapter", "mlp" if self.freeze_base else "none")
        if self.learning_rate == 0:
            usual = _ADAPTER_LEARNING_RATE if self.freeze_base else _MODEL_LEARNING_RATE
            object.__setattr__(self, "learning_rate", usual)
        runs.check_choice(self, "kd", distillation.KINDS)
        runs.check_choice(self, "adapter", ADAPTERS)
        runs.check_choice(self, "targets", runs.TARGETS)
        if self.adapter == "none":
            object.__setattr__(self, "adapter_width", 0)
        else:
            runs.check_range(self, "adapter_width", 1, checkpoint.MAX_ADAPTER_WIDTH)
        if self.freeze_base and self.adapter == "none":
            raise ConfigError(
                "freeze_base with adapter='none' leaves nothing to train: expected an "
                "adapter or a model that learns; choose mlp or low_rank, or leave "
                "--freeze-base out."
            )
        if not 0 <= self.kd_weight < float("inf"):
            raise ConfigError(
                f"kd_weight={self.kd_weight} is out of range: expected 0 or more; the "
                "paper has 0.5."
            )


def train(run: ExitRun) -> dict[str, Any]:
    """Trains, measures and saves an exit; resumes if the output holds a checkpoint.

    With `freeze_base` the output is the exit's folder. Without, it is a transformers
    folder of the whole model in bfloat16, with the exit in its folder `free`.

    Returns:
        The held-out figures, as written to `OUTPUT/metrics.json`.

    Raises:
        ConfigError: the settings, the data or the tokenizer do not fit the model.
    """
    begun = runs.prepare(run, fast_dtype() if run.freeze_base else torch.float32)
    model = _new_model(run, begun.base)
    before = _deep_loss(run, model, begun)
    if not runs.fit(run, begun, model):
        return {}
    round_as_saved(model.trained)
    seen = _seen(model.eval(), begun)
    figures = exit_figures.figures(seen) | {
        f"deep_loss{when}": loss
        for when, loss in (("_before", before), ("", _deep_loss(run, model, begun)))
        if loss is not None
    }
    _save(run, begun, model, seen)
    card.write_exit(run.output, run, figures, model.num_layers, len(begun.training))
    card.write_figures(run.output, figures)
    logger.info("Exit saved to %s: %s", run.output, figures)
    return figures


def _new_model(run: ExitRun, base: Any) -> ShallowDeep:
    num_layers = base.config.num_hidden_layers
    if not 1 <= run.exit_layer < num_layers:
        raise ConfigError(
            f"exit_layer={run.exit_layer} is not inside the model: expected "
            f"1..{num_layers - 1} (num_layers={num_layers}); a quarter to a third of the "
            "depth is a good start."
        )
    torch.manual_seed(run.seed)
    adapter = ExitAdapter(run.adapter, base.config.hidden_size, run.adapter_width)
    return ShallowDeep(
        base,
        adapter,
        exit_layer=run.exit_layer,
        kd=run.kd,
        kd_weight=run.kd_weight,
        freeze_base=run.freeze_base,
        follow_base=run.targets == "base",
    )


def _deep_loss(run: ExitRun, model: ShallowDeep, begun: runs.Prepared) -> float | None:
    """Of the held-out text; None where training cannot change it."""
    if run.freeze_base:
        return None
    return round(exit_figures.deep_loss(model.eval(), begun.held_out), 4)


def _seen(model: ShallowDeep, begun: runs.Prepared) -> ExitObservations:
    seen = exit_figures.observe(model, evaluate.continued(model, begun.held_out))
    if len(seen.ends) == 0:
        raise ConfigError(
            "No held-out token can be scored, as rows are too short: expected longer "
            "ones; give more text or raise --held-out-rows."
        )
    return seen


def _save(
    run: ExitRun, begun: runs.Prepared, model: ShallowDeep, seen: ExitObservations
) -> None:
    folder, base_folder, base_name = run.output, begun.folder, Path(run.model).name
    test = seen.self_test(model)
    model.trained.to(SAVED_DTYPE)
    if not run.freeze_base:
        model.base.save_pretrained(run.output)
        begun.tokenizer.save_pretrained(run.output)
        folder, base_folder = run.output / EXIT_FOLDER, run.output
        base_name = run.output.resolve().name
    config = checkpoint.ExitConfig(
        format=checkpoint.FORMAT,
        exit_layer=run.exit_layer,
        num_layers=model.num_layers,
        hidden_size=model.base.config.hidden_size,
        vocab_size=model.base.config.vocab_size,
        adapter=run.adapter,
        adapter_width=run.adapter_width,
        base_name=base_name,
        base_fingerprint=base_model.fingerprint(base_folder),
        threshold=seen.threshold(),
        agreement=round(test.agreement(), 4),
    )
    checkpoint.save(folder, config, model.adapter, test)
