"""Exact-match retrieval by prompt length, and the held-out loss, of a reference model.

Teacher-forced: an answer counts if the model's first choice is right at each of its three
digits, which is the same as greedy decoding saying them. Names are never those of
training tasks.

    python retrieval.py CORPUS MODEL --lengths 1024,2048,4096 --questions 300
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tasks import Names, TaskWriter
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM

KEYS = 4
WINDOW = 1024
BATCH_TOKENS = 8192


def held_out_ids(corpus: Path, tokenizer: Tokenizer, kind: str) -> np.ndarray:
    """All held-out text of a kind, one file after another: [tokens]."""
    lines = map(json.loads, (corpus / "held_out.jsonl").read_text().splitlines())
    texts = [line["text"] for line in lines if line["kind"] == kind]
    return np.concatenate([np.array([*tokenizer.encode(t).ids, 0]) for t in texts])


@torch.inference_mode()
def retrieval(model, writer: TaskWriter, length: int, questions: int, seed: int = 0):
    """Share of questions whose three digits are all right."""
    rng = np.random.default_rng(seed)
    right = 0
    at_once = max(1, BATCH_TOKENS // length)
    for first in tqdm(range(0, questions, at_once), desc=f"{length} tokens"):
        count = min(at_once, questions - first)
        pairs = [writer.question(length, KEYS, rng) for _ in range(count)]
        ids = np.stack([np.concatenate(pair) for pair in pairs]).astype(np.int64)
        logits = model(torch.from_numpy(ids), logits_to_keep=4, use_cache=False).logits
        said = logits[:, :3].argmax(dim=-1).numpy()
        right += int((said == ids[:, -3:]).all(axis=1).sum())
    return right / questions


@torch.inference_mode()
def loss(model, ids: np.ndarray, windows: int) -> float:
    """Mean nats a token over windows spread evenly over the text."""
    firsts = np.linspace(0, len(ids) - WINDOW, min(windows, len(ids) // WINDOW)).astype(int)
    rows = torch.from_numpy(
        np.stack([ids[i : i + WINDOW] for i in firsts]).astype(np.int64)
    )
    losses = [
        functional.cross_entropy(model(row).logits[0, :-1].float(), row[0, 1:])
        for row in rows.split(1)
    ]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--windows", type=int, default=100)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    figures: dict = {}
    for kind in ("code", "prose"):
        ids = held_out_ids(args.corpus, tokenizer, kind)
        figures[f"held_out_loss_{kind}"] = round(loss(model, ids, args.windows), 3)
    filler = held_out_ids(args.corpus, tokenizer, "code")
    writer = TaskWriter(tokenizer, filler, Names.of(tokenizer).test)
    for length in map(int, args.lengths.split(",")):
        share = retrieval(model, writer, length, args.questions)
        figures[f"retrieval_{length}"] = round(share, 3)
    print(json.dumps(figures | {"questions": args.questions, "keys": KEYS}, indent=2))


if __name__ == "__main__":
    main()
