"""Trains the reference model for a given time; run again to go on after a stop.

Muon for matrices, AdamW for the rest, bf16 autocast. The first 60 % of the time is spent
at 512 tokens a row, the rest at 1024 to 4096. Paused time (SIGSTOP) does not count.

    python pretrain.py CORPUS OUT --model weights --minutes 90
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tasks import Names, TaskWriter
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

logger = logging.getLogger("pretrain")

BATCH_TOKENS = 4096
SHORT = 512
LONG_SHARE = {1024: 0.6, 2048: 0.25, 4096: 0.15}
LONG_FROM = 0.6
POSITIONS = 8192
TASK_SHARE = {512: 0.15, 1024: 0.15, 2048: 0.2, 4096: 0.3}
PROSE_SHARE = 0.03
SPREAD_SHARE = 0.4
ANSWER_WEIGHT = 4.0
MUON_RATE, ADAM_RATE = 0.012, 1.5e-3
LONGEST_STEP_S = 30.0
SAVE_EVERY_S = 300.0


@dataclass(slots=True)
class Batches:
    """Rows of code, prose and tasks, in the mixture of the moment."""

    corpus: Path
    tokenizer: Tokenizer
    rng: np.random.Generator
    code: np.ndarray = field(init=False)
    prose: np.ndarray = field(init=False)
    tasks: TaskWriter = field(init=False)

    def __post_init__(self) -> None:
        self.code = np.memmap(self.corpus / "code.bin", dtype=np.uint16, mode="r")
        self.prose = np.memmap(self.corpus / "prose.bin", dtype=np.uint16, mode="r")
        names = Names.of(self.tokenizer).training
        self.tasks = TaskWriter(self.tokenizer, self.code, names)

    def next(self, done: float) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, loss weights and positions, each [rows, tokens].

        Args:
            done: the share of the training time that has passed.
        """
        length = SHORT
        if done >= LONG_FROM:
            length = int(self.rng.choice(list(LONG_SHARE), p=list(LONG_SHARE.values())))
        rows = max(1, BATCH_TOKENS // length)
        ids, marks = zip(*(self._row(length) for _ in range(rows)), strict=True)
        weights = 1 + (ANSWER_WEIGHT - 1) * torch.from_numpy(np.stack(marks)).float()
        positions = torch.from_numpy(self._positions(length))
        ids = torch.from_numpy(np.stack(ids).astype(np.int64))
        return ids, weights, positions.expand(rows, -1)

    def _row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        if self.rng.random() < TASK_SHARE[length]:
            return self.tasks.row(length, self.rng)
        text = self.prose if self.rng.random() < PROSE_SHARE else self.code
        first = int(self.rng.integers(0, len(text) - length))
        return np.asarray(text[first : first + length]), np.zeros(length, dtype=bool)

    def _positions(self, length: int) -> np.ndarray:
        """Some short rows leave out positions, so that long distances are met early
        (PoSE, arXiv 2309.10400)."""
        positions = np.arange(length)
        if length == SHORT and self.rng.random() < SPREAD_SHARE:
            for start in self.rng.integers(1, length, size=2):
                room = POSITIONS - 1 - positions[-1]
                positions[start:] += int(self.rng.integers(0, room // 2 + 1))
        return positions


def loss_of(model, ids: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """Mean weighted cross-entropy in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # All ones: without a mask transformers takes a gap in positions for a new text.
        logits = model(
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            use_cache=False,
        ).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def rate(done: float, steps: int) -> float:
    """Share of the full learning rate: warm-up, plateau to 40 %, then down to 2 %."""
    plateau = 1.0 if done < 0.4 else max(0.02, 1 - (done - 0.4) / 0.6)
    return min(1.0, (steps + 1) / 40) * plateau


class Run:
    """A model in training, with what is needed to go on after a stop."""

    def __init__(self, model_folder: Path, out: Path) -> None:
        self.out = out
        self.file = out / "training.pt"
        self.model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        named = dict(self.model.named_parameters())
        matrices = {n for n, p in named.items() if p.ndim == 2 and "embed" not in n}
        self.optimizers = [
            torch.optim.Muon(
                [p for n, p in named.items() if n in matrices], weight_decay=0.02
            ),
            torch.optim.AdamW(
                [p for n, p in named.items() if n not in matrices],
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        ]
        self.spent_s, self.steps, self.tokens = 0.0, 0, 0
        if self.file.is_file():
            self._load()

    def step(self, batch: tuple[Tensor, Tensor, Tensor], share: float) -> float:
        """One update at `share` of the full learning rates; returns the loss."""
        loss = loss_of(self.model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, full in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * share
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        self.tokens += batch[0].numel()
        return loss.item()

    def save(self) -> None:
        """Writes a checkpoint beside the last one, then puts it in its place."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counts": (self.spent_s, self.steps, self.tokens),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.spent_s, self.steps, self.tokens = state["counts"]
        logger.info("going on after %d steps", self.steps)


def train(run: Run, batches: Batches, seconds: float) -> None:
    """Trains until `seconds` of work are spent, saving as it goes."""
    average, saved_s = None, run.spent_s
    while run.spent_s < seconds:
        begun = time.monotonic()
        done = run.spent_s / seconds
        loss = run.step(batches.next(done), rate(done, run.steps))
        run.spent_s += min(time.monotonic() - begun, LONGEST_STEP_S)
        average = loss if average is None else 0.97 * average + 0.03 * loss
        if run.steps % 20 == 0:
            logger.info(
                "step %d loss %.3f %.2f M tokens, %.0f of %.0f min",
                *(run.steps, average, run.tokens / 1e6, run.spent_s / 60, seconds / 60),
            )
        if run.spent_s - saved_s > SAVE_EVERY_S:
            run.save()
            saved_s = run.spent_s
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="weights to start from")
    parser.add_argument("--minutes", type=float, default=90)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.model, args.out)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    batches = Batches(args.corpus, tokenizer, np.random.default_rng(run.steps))
    train(run, batches, args.minutes * 60)
    run.model.to(torch.bfloat16).save_pretrained(args.out / "weights")
    (args.out / "run.json").write_text(
        json.dumps({"steps": run.steps, "tokens": run.tokens, "minutes": args.minutes})
    )


if __name__ == "__main__":
    main()
