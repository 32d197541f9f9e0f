"""How far LazyLLM's answers to plain text stay the whole prompt's, pages against tokens.

    python continuation_study.py MODEL held_out.jsonl --length 4000 --prompts 20

The retrieval study asks for a few tokens; here a long answer is given, during which pages
can come back and single tokens cannot. Texts as `corpus.py` writes them, cut to length.
"""

import argparse
import json
import statistics
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

from vllm_accel.host import engines

WAYS = [
    {"granularity": "token"},
    {"granularity": "page"},
    {"granularity": "page", "revive": "off"},
]


def texts(file: Path, tokenizer, length: int, count: int) -> list[list[int]]:
    """Token ids of the first texts that are long enough, the middle of each."""
    found: list[list[int]] = []
    for line in file.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])
        if len(ids) >= length and len(found) < count:
            middle = (len(ids) - length) // 2
            found.append(ids[middle : middle + length])
    return found


def answers(options, way: dict, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Of every prompt the dense answer and the pruned one."""
    engine = engines.Engine(
        model=options.model,
        max_model_len=options.length + options.tokens,
        max_num_seqs=8,
        kv_cache_memory_bytes=2**28,
        block_size=64,
        dtype=options.dtype,
        additional_config={"lazyllm": way},
    )
    found = [
        [_ask(engine, ids, options.tokens, lazy) for lazy in (False, None)]
        for ids in tqdm(prompts)
    ]
    engine.close()
    return found


def _ask(engine, ids: list[int], tokens: int, lazy: bool | None) -> list[int]:
    engine.reset_prefix_cache()
    sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    steps = engine.run([ids], [sampling | {"extra_args": {"lazyllm": lazy}}])
    return [token for _, given in steps for token in given.get(0, [])]


def same(pair: list[list[int]]) -> int:
    """Tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ways", type=json.loads, default=WAYS, help="of lazyllm")
    options = parser.parse_args()
    tokenizer = engines.tokenizer(options.model)
    prompts = texts(options.texts, tokenizer, options.length, options.prompts)
    for way in options.ways:
        alike = [same(pair) for pair in answers(options, way, prompts)]
        first = sum(n > 0 for n in alike)
        whole = sum(n == options.tokens for n in alike)
        print(
            f"{way}: {len(alike)} answers, {statistics.fmean(alike):.1f} of "
            f"{options.tokens} tokens before the first other one (median "
            f"{statistics.median(alike)}); first token the same in {first}, all in {whole}"
        )


if __name__ == "__main__":
    main()
