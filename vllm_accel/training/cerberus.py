"""`vllm-accel train cerberus`: heads on a frozen base, by transformers' Trainer."""

import dataclasses
import json
import logging
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
    TrainingArguments,
)

from vllm_accel.cerberus import base_model, checkpoint, location, medusa
from vllm_accel.cerberus.checkpoint import MAX_BLOCKS
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import ConfigError
from vllm_accel.training import card, data, evaluate
from vllm_accel.training.model import FrozenBaseWithHeads

logger = logging.getLogger(__name__)

HEADS = ("cerberus", "medusa")
"""Kinds of heads: linked, or Medusa's single block, which vLLM's own `medusa` loads."""

TARGETS = ("data", "base")
"""What heads learn: the text's tokens, or the base's own where the text follows them."""

VLLM_MEDUSA = "vllm_medusa"
"""Folder beside Medusa heads with the same in vLLM's own format."""

_HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What a training run is asked for; the command line's options, one to one."""

    model: str
    data: tuple[Path, ...]
    output: Path
    heads: str = "cerberus"
    targets: str = "data"
    draft_tokens: int = 4
    blocks: int = 2
    cross_links: bool = True
    own_lm_heads: bool = False
    draft_vocab: int = 0
    epochs: float = 1.0
    learning_rate: float = 1e-3
    batch_size: int = 8
    row_tokens: int = 512
    held_out_rows: int = 64
    draft_cost: float = 0.35
    save_steps: int = 200
    seed: int = 0
    license: str = "other"

    def __post_init__(self) -> None:
        for name, allowed in (("heads", HEADS), ("targets", TARGETS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not known: expected "
                    f"{' or '.join(allowed)}; change it."
                )
        if self.heads == "medusa":
            object.__setattr__(self, "blocks", 1)
            object.__setattr__(self, "cross_links", False)
        for name, most in (("draft_tokens", MAX_DRAFT_TOKENS), ("blocks", MAX_BLOCKS)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is out of range: expected 1..{most}; "
                    "change it."
                )


class HeadsTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer whose checkpoints hold the heads alone: the base never changes."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model.heads, str(folder / _HEADS_FILE))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        load_model(self.model.heads, Path(checkpoint) / _HEADS_FILE)


def train(run: TrainingRun) -> dict[str, Any]:
    """Trains, measures and saves heads; resumes if the output holds a checkpoint.

    Returns:
        The held-out figures, as written to `OUTPUT/metrics.json`.

    Raises:
        ConfigError: the data or the tokenizer do not fit the model.
    """
    data.check_files(run.data)
    work = work_folder(run, "checkpoints")
    folder = location.model_folder(run.model)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_tokenizer(tokenizer, base)
    rows = data.read_rows(run.data, tokenizer, run.row_tokens)
    _check_vocabulary(rows, base)
    training, held_out = data.split(rows, run.held_out_rows, run.seed)
    heads = _new_heads(run, base)
    model = FrozenBaseWithHeads(base, heads, follow_base=run.targets == "base")
    trainer = HeadsTrainer(
        model=model,
        args=_arguments(run, work),
        train_dataset=training,
        data_collator=data.collate,
    )
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(work))
    if not trainer.is_world_process_zero():  # the others of `accelerate launch`
        return {}
    model.heads.to(torch.bfloat16)  # as saved, so that the figures are of the saved heads
    if run.heads == "medusa":
        medusa.write_for_vllm(run.output / VLLM_MEDUSA, heads, base.lm_head.weight)
    if 0 < run.draft_vocab < base.config.vocab_size:
        heads.limit_vocabulary(data.most_frequent(training, run.draft_vocab))
    figures = _finish(run, folder, model, held_out)
    card.write(run.output, run, figures, len(training))
    return figures


def whole_texts(run: TrainingRun) -> list[list[int]]:
    """Token ids of every text of the run's data, before the model continues them.

    Raises:
        ConfigError: a file is missing or a line is not what it should be.
    """
    data.check_files(run.data)
    work_folder(run, "generation")
    tokenizer = AutoTokenizer.from_pretrained(location.model_folder(run.model))
    rows = data.read_rows(run.data, tokenizer, row_tokens=sys.maxsize)
    return [row["input_ids"] for row in rows]


def work_folder(run: TrainingRun, name: str) -> Path:
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


def _new_heads(run: TrainingRun, base: Any) -> CerberusHeads:
    heads = CerberusHeads(
        draft_tokens=run.draft_tokens,
        blocks=run.blocks,
        hidden_size=base.config.hidden_size,
        cross_links=run.cross_links,
        vocab_size=base.config.vocab_size,
        own_lm_heads=run.own_lm_heads,
    )
    if heads.lm_heads is not None:
        heads.lm_heads.data[:] = base.lm_head.weight.float()
    return heads


def _arguments(run: TrainingRun, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=20,
        seed=run.seed,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


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
        own_lm_heads=run.own_lm_heads,
        draft_vocab_size=_draft_vocab_size(model),
        base_name=Path(run.model).name,
        base_fingerprint=base_model.fingerprint(folder),
        entropy_threshold=threshold,
        accepted_per_step=_self_test_acceptance(model, test),
    )
    checkpoint.save(run.output, config, model.heads, test)
    card.write_figures(run.output, figures)
    logger.info("Heads saved to %s: %s", run.output, figures)
    return figures


def _draft_vocab_size(model: FrozenBaseWithHeads) -> int:
    ids = model.heads.draft_token_ids
    return model.base.config.vocab_size if ids is None else len(ids)


@torch.no_grad()
def _self_test_acceptance(model: FrozenBaseWithHeads, test: checkpoint.SelfTest) -> float:
    states = test.hidden_states.to(next(model.heads.parameters()))
    drafts = checkpoint.best_drafts(model.heads, states, model.base.lm_head.weight)
    return round(test.accepted(drafts.cpu()), 4)


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
