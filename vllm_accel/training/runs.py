"""What every training run has: settings, folders, data, and the Trainer around a model."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vllm_accel.errors import ConfigError
from vllm_accel.on_disk import location
from vllm_accel.training import data
from vllm_accel.training.precision import fast_dtype

TARGETS = ("data", "base")
"""What is learnt: the text's tokens, or the base's own choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What any training run is asked for; the command line's options, one to one."""

    model: str
    data: tuple[Path, ...]
    output: Path
    epochs: float = 1.0
    learning_rate: float = 1e-3
    batch_size: int = 8
    row_tokens: int = 512
    held_out_rows: int = 64
    save_steps: int = 200
    seed: int = 0
    license: str = "other"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run starts from, read and checked."""

    work: Path
    """Folder of the run's checkpoints."""
    folder: Path
    """Of the model's files."""
    base: Any
    """A transformers causal language model."""
    tokenizer: Any
    training: list[data.Row]
    held_out: list[data.Row]


def check_choice(run: Run, key: str, allowed: tuple[str, ...]) -> None:
    """Refuses a setting that is none of the allowed words.

    Raises:
        ConfigError: naming them.
    """
    if getattr(run, key) not in allowed:
        raise ConfigError(
            f"{key}={getattr(run, key)!r} is not known: expected {' or '.join(allowed)}; "
            "change it."
        )


def check_range(run: Run, key: str, least: int, most: int) -> None:
    """Refuses a setting outside its range, ends included.

    Raises:
        ConfigError: naming the range.
    """
    if not least <= getattr(run, key) <= most:
        raise ConfigError(
            f"{key}={getattr(run, key)} is out of range: expected {least}..{most}; "
            "change it."
        )


def prepare(run: Run, dtype: torch.dtype) -> Prepared:
    """The model in a float type, and rows of its tokens.

    Raises:
        ConfigError: the data or the tokenizer do not fit the model, or the output holds
            another run.
        CheckpointError: there is no such model.
    """
    data.check_files(run.data)
    work = work_folder(run, "checkpoints")
    folder = location.model_folder(run.model)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_tokenizer(tokenizer, base)
    rows = data.read_rows(run.data, tokenizer, run.row_tokens)
    _check_vocabulary(rows, base)
    training, held_out = data.split(rows, run.held_out_rows, run.seed)
    return Prepared(work, folder, base, tokenizer, training, held_out)


def whole_texts(run: Run) -> list[list[int]]:
    """Token ids of every text of the run's data, before the model continues them.

    Raises:
        ConfigError: a file is missing or a line is not what it should be.
    """
    data.check_files(run.data)
    work_folder(run, "generation")
    tokenizer = AutoTokenizer.from_pretrained(location.model_folder(run.model))
    rows = data.read_rows(run.data, tokenizer, row_tokens=sys.maxsize)
    return [row["input_ids"] for row in rows]


def work_folder(run: Run, name: str) -> Path:
    """A folder of this very run in its output: resuming another would mix two."""
    work = run.output / name
    _make_writable(work)
    asked = {key: str(value) for key, value in dataclasses.asdict(run).items()}
    note = work / "run.json"
    begun = json.loads(note.read_text()) if note.is_file() else asked
    for key in asked:
        if begun.get(key) != asked[key] and key not in ("output", "save_steps"):
            raise ConfigError(
                f"{work} belongs to a run with {key}={begun.get(key)}, not {asked[key]}: "
                "expected the same settings to go on; name another --output or delete it."
            )
    note.write_text(json.dumps(asked, indent=2) + "\n")
    return work


def fit(run: Run, begun: Prepared, model: Any) -> bool:
    """Trains a model, from the run's last checkpoint on if there is one.

    Args:
        model: an `nn.Module` with `forward(input_ids, labels)` -> {"loss"}, the module
            that learns as `trained`, and its name, for files, as `trained_name`.

    Returns:
        Whether this is the process that saves; others belong to `accelerate launch`.
    """
    trainer = _PartTrainer(
        model=model,
        args=_arguments(run, begun.work),
        train_dataset=begun.training,
        data_collator=data.collate,
    )
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(begun.work))
    return bool(trainer.is_world_process_zero())


class _PartTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer whose checkpoints hold what is trained alone: the rest never changes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._order = torch.Generator()
        self.add_callback(_SameOrder(self._order))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        sampler.generator = self._order
        return sampler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model.trained, str(self._file(folder)))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        load_model(self.model.trained, self._file(Path(checkpoint)))

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.model.trained_name}.safetensors"


class _SameOrder(TrainerCallback):  # type: ignore[misc]  # as above
    """Rows come in an order of seed and epoch alone.

    The Trainer draws it from the state of the global generator, which a resumed run does
    not have when an epoch begins: after the first it would see some rows twice.
    """

    def __init__(self, order: torch.Generator) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.manual_seed(args.seed + int(state.epoch or 0))


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be written ({error}): expected a folder; name "
            "another."
        ) from error


def _last_complete_checkpoint(work: Path) -> str | None:
    """The newest checkpoint; the Trainer writes its state last, so none half written."""
    states = work.glob("checkpoint-*/trainer_state.json")
    steps = {int(state.parent.name.partition("-")[2]): state.parent for state in states}
    return str(steps[max(steps)]) if steps else None


def _arguments(run: Run, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        bf16=fast_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=20,
        seed=run.seed,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _check_vocabulary(rows: list[data.Row], base: Any) -> None:
    largest = max((max(row["input_ids"]) for row in rows), default=0)
    if largest >= base.config.vocab_size:
        raise ConfigError(
            f"The data has token id {largest}, the model's vocabulary ends at "
            f"{base.config.vocab_size - 1}: expected ids of this model's tokenizer; check "
            "--data."
        )


def _check_tokenizer(tokenizer: Any, base: Any) -> None:
    if len(tokenizer) > base.config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocabulary "
            f"{base.config.vocab_size}: expected the model's own tokenizer; check --model."
        )
