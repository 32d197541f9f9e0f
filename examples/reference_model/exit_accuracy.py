"""Exits side by side: how often the first layers say what all of them say, by text.

    python exit_accuracy.py MODEL --prompts A.jsonl B.jsonl --exits FOLDER ...

Greedy answers of 128 tokens, loops included. The layers as they are, without an adapter,
then exits that `vllm-accel train free --freeze-base` wrote.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_accel.free import checkpoint
from vllm_accel.free.exit_head import ExitAdapter
from vllm_accel.training import evaluate, exit_figures
from vllm_accel.training.data import Row
from vllm_accel.training.shallow_deep import ShallowDeep


def answers(base, tokenizer, file: Path, count: int) -> list[Row]:
    """The model's own, to the first prompts of a file."""
    texts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    prompts = [tokenizer.encode(text) for text in texts[:count]]
    said = (next(evaluate.greedy(base, [prompt])) for prompt in prompts)
    return [evaluate.asked(*pair) for pair in zip(prompts, said, strict=True)]


def figures(base, exit_layer: int, adapter: ExitAdapter, rows: list[Row]) -> dict:
    """Of one exit on one kind of text."""
    model = ShallowDeep(
        base,
        adapter,
        exit_layer=exit_layer,
        kd="last",
        kd_weight=0.0,
        freeze_base=True,
        follow_base=True,
    ).eval()
    seen = exit_figures.observe(model, rows)
    whole = exit_figures.figures(seen)
    kept = ("held_out_tokens", "agreement", "mean_agreed_run", "confidence_auc")
    return {key: whole[key] for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--exit-layers", type=json.loads, default=[2, 3, 4, 6])
    parser.add_argument("--exits", type=Path, nargs="*", default=[])
    parser.add_argument("--num-prompts", type=int, default=60, help="of each file")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    by_kind = {
        file.stem: answers(base, tokenizer, file, options.num_prompts)
        for file in options.prompts
    }
    exits = [("none", n, ExitAdapter("none", 0, 0)) for n in options.exit_layers]
    for folder in options.exits:
        config, adapter = checkpoint.load(folder)
        exits.append((folder.name, config.exit_layer, adapter.float()))
    for name, layer, adapter in exits:
        for kind, rows in by_kind.items():
            facts = {"adapter": name, "exit_layer": layer, "text": kind}
            print(json.dumps(facts | figures(base, layer, adapter, rows)), flush=True)


if __name__ == "__main__":
    main()
