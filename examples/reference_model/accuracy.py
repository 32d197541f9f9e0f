"""Heads side by side: how often they are right, on code, prose, and text that loops.

Greedy continuations of held-out text. Those that end in a loop stand apart: drafts for
them are easy. `top_1` counts a head alone, `accepted` the tokens of a whole draft.

    python accuracy.py CORPUS MODEL MODEL/cerberus MODEL/medusa
"""

import argparse
import json
from pathlib import Path

import torch
from retrieval import held_out_ids
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from vllm_accel.cerberus import checkpoint
from vllm_accel.looping import loops
from vllm_accel.training import evaluate
from vllm_accel.training.data import Row
from vllm_accel.training.model import FrozenBaseWithHeads

PROMPT = 96


def continuations(base, ids: list[int], count: int) -> list[tuple[bool, Row]]:
    """(whether it ends in a loop, row) of prompts spread evenly over the text."""
    step = max(PROMPT, len(ids) // count)
    prompts = [ids[i : i + PROMPT] for i in range(0, len(ids) - PROMPT, step)]
    said = evaluate.greedy(base, prompts)
    return [
        (loops(own), evaluate.asked(prompt, own))
        for prompt, own in zip(prompts, said, strict=True)
    ]


def kinds_of_text(base, corpus: Path, tokenizer: Tokenizer, count: int):
    """Rows by kind: code, prose, and what loops of either."""
    rows: dict[str, list[Row]] = {"code": [], "prose": [], "looping": []}
    for kind in ("code", "prose"):
        ids = held_out_ids(corpus, tokenizer, kind).tolist()
        for looping, row in continuations(base, ids, count):
            rows["looping" if looping else kind].append(row)
    return rows


def figures(base, folder: Path, rows: list[Row]) -> dict:
    _, heads = checkpoint.load(folder)
    model = FrozenBaseWithHeads(base, heads.to(torch.bfloat16))
    seen = evaluate.observe(model, rows)
    accepted = round(float(seen.accepted.float().mean()), 3)
    facts = {"tokens": len(seen.entropy), "top_1": seen.top_k_share(1)}
    return facts | {"accepted": accepted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("model", type=Path)
    parser.add_argument("heads", type=Path, nargs="+", help="folders that training wrote")
    parser.add_argument("--rows", type=int, default=300, help="per kind; default 300")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    by_kind = kinds_of_text(base, args.corpus, tokenizer, args.rows)
    for folder in args.heads:
        for kind, rows in by_kind.items():
            facts = {"heads": folder.name, "text": kind, "rows": len(rows)}
            print(json.dumps(facts | figures(base, folder, rows)), flush=True)


if __name__ == "__main__":
    main()
