"""Code to be written again with one name changed: a task on which most tokens are easy.

    python edit_task.py start MODEL START
    python edit_task.py rows CORPUS MODEL --count 6400 > edits.jsonl
    python edit_task.py prompts CORPUS MODEL --count 64 > prompts/edits.jsonl

FREE is made for models trained on a task. Rows are made from the corpus's training code,
prompts from held-out packages, and changed to names that no row changes to.

`start` is the model with its fifth layer moved to the third place. That is the first layer
that attends to what followed the last time, which copying needs and which would take long
to learn anew; there it lies before an exit after three layers.
"""

import argparse
import json
import keyword
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from retrieval import held_out_ids
from safetensors.torch import load_file, save_file
from tasks import Names
from tokenizers import Tokenizer

SHORTEST, LONGEST = 135, 215  # tokens of code, so that a row has 512 at most
PLAIN_SHARE = 0.1  # of rows, so that the model does not forget how to write code
ORDER = [0, 1, 4, 2, 3, 5, 6, 7, 8, 9, 10, 11]  # of the layers, where copying comes early
_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_NAME = re.compile(r"\b[a-z_][a-z_0-9]{3,}\b")


def edits(
    ids: np.ndarray, tokenizer: Tokenizer, names: list[str], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """(prompt, answer) without end, from random places of a text [tokens]."""
    end_of_text = tokenizer.id_to_token(0)
    while True:
        length = rng.randint(SHORTEST + 15, LONGEST + 15)
        first = rng.randrange(len(ids) - length)
        piece = tokenizer.decode(ids[first : first + length], skip_special_tokens=False)
        if end_of_text in piece:
            continue
        code = "\n".join(piece.split("\n")[1:-1])
        found = [n for n in _NAME.findall(code) if not keyword.iskeyword(n)]
        often = sorted({name for name in found if found.count(name) > 1})
        if not often:
            continue
        old, new = rng.choice(often), rng.choice(names)
        edited = re.sub(rf"\b{old}\b", new, code)
        if len(tokenizer.encode(edited).ids) >= SHORTEST - 5:
            yield f"# code\n{code}\n# rename {old} to {new}\n", edited


def rows(corpus: Path, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[dict]:
    """Lines of `vllm-accel train --data`; of an edit the answer alone is learnt."""
    rng = random.Random(seed)
    ids = np.memmap(corpus / "code.bin", dtype=np.uint16, mode="r")
    made = edits(ids, tokenizer, Names.of(tokenizer).training, rng)
    end_of_text = tokenizer.id_to_token(0)
    for _ in range(count):
        if rng.random() < PLAIN_SHARE:
            first = rng.randrange(len(ids) - 512)
            piece = ids[first : first + 500]
            yield {"text": tokenizer.decode(piece, skip_special_tokens=False)}
        else:
            prompt, answer = next(made)
            asked = tokenizer.encode(prompt).ids
            said = tokenizer.encode(f"{answer}\n{end_of_text}").ids
            yield {"prompt_ids": asked, "token_ids": said}


def prompts(corpus: Path, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[dict]:
    """Lines of `vllm-accel bench decode --prompts`, with what the answer should be."""
    rng = random.Random(seed)
    ids = held_out_ids(corpus, tokenizer, "code")
    made = edits(ids, tokenizer, Names.of(tokenizer).test, rng)
    for _ in range(count):
        prompt, answer = next(made)
        yield {"prompt": prompt, "answer": answer}


def start(model: Path, folder: Path) -> None:
    """Writes the model with its layers in `ORDER`."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("cerberus", "medusa"))
    weights = load_file(model / "model.safetensors")
    moved = {_moved(name): weight for name, weight in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})


def _moved(name: str) -> str:
    found = _LAYER.fullmatch(name)
    return f"{found[1]}{ORDER.index(int(found[2]))}{found[3]}" if found else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    begin = commands.add_parser("start", help="a model to train")
    begin.add_argument("model", type=Path)
    begin.add_argument("folder", type=Path)
    for name, what in (("rows", "training data"), ("prompts", "held-out prompts")):
        lines = commands.add_parser(name, help=what)
        lines.add_argument("corpus", type=Path, help="what corpus.py wrote")
        lines.add_argument("model", type=Path, help="for its tokenizer")
        lines.add_argument("--count", type=int, required=True)
        lines.add_argument("--seed", type=int, default=0 if name == "rows" else 1)
    options = parser.parse_args()
    if options.what == "start":
        start(options.model, options.folder)
        return
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    make = rows if options.what == "rows" else prompts
    for line in make(options.corpus, tokenizer, options.count, options.seed):
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
