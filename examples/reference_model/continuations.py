"""Continue windows of text with the model itself: the text draft heads are trained on.

Heads predict what the *model* says next, so they learn most from its own greedy words.
Writes JSON lines {"prompt_ids": [...], "token_ids": [...]}; run again to add to a file.

    python continuations.py MODEL OUT.jsonl --files 'src/**/*.py' --rows 4000
"""

import argparse
import glob
import json
import random
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

PROMPT_TOKENS = 96
LOOP_WINDOW = 64
LOOP_DISTINCT_4GRAMS = 16


def without_loop(token_ids: list[int]) -> list[int]:
    """The tokens up to where the last 64 hold fewer than 16 distinct 4-grams."""
    for stop in range(LOOP_WINDOW, len(token_ids) + 1, 16):
        window = token_ids[stop - LOOP_WINDOW : stop]
        grams = {tuple(window[i : i + 4]) for i in range(LOOP_WINDOW - 3)}
        if len(grams) < LOOP_DISTINCT_4GRAMS:
            return token_ids[: stop - LOOP_WINDOW // 2]
    return token_ids


def prompts(tokenizer, files: list[str], rows: int, rng: random.Random):
    """Windows of the files, as many as asked; small files are passed over."""
    files = [f for f in files if Path(f).stat().st_size > 8 * PROMPT_TOKENS]
    if not files:
        raise SystemExit("No file is long enough: expected some over 1 kB; check --files.")
    while rows:
        text = Path(rng.choice(files)).read_text(encoding="utf-8", errors="ignore")
        ids = tokenizer(text).input_ids
        if len(ids) > PROMPT_TOKENS:
            first = rng.randrange(len(ids) - PROMPT_TOKENS)
            yield ids[first : first + PROMPT_TOKENS]
            rows -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--files", nargs="+", required=True, help="glob patterns")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    files = sorted(f for p in args.files for f in glob.glob(p, recursive=True))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    llm = LLM(args.model, max_model_len=1024, max_num_seqs=128, kv_cache_memory_bytes=2**30)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens, detokenize=False)
    source = prompts(tokenizer, files, args.rows, random.Random(args.seed))
    with args.output.open("a") as out, tqdm(total=args.rows) as progress:
        while batch := list(islice(source, 512)):
            inputs = [{"prompt_token_ids": p} for p in batch]
            answers = llm.generate(inputs, sampling, use_tqdm=False)
            for prompt, result in zip(batch, answers, strict=True):
                kept = without_loop(list(result.outputs[0].token_ids))
                out.write(json.dumps({"prompt_ids": prompt, "token_ids": kept}) + "\n")
            out.flush()
            progress.update(len(batch))


if __name__ == "__main__":
    main()
