"""Decode rate of plain vLLM and of cerberus, offline, in turns, in one run.

    python examples/measure.py --rounds 5 --batch-size 1

Both engines are up at once (vLLM's defaults: compiled, split-KV on) and asked in turns,
so that a machine shared with others slows both alike. `plain again` is plain vLLM
against itself: what the machine's noise alone does to a ratio.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_accel.serve import with_preloads

HERE = Path(__file__).parent / "reference_model"
COUNTERS = ("vllm:accel_output_tokens", "vllm:accel_request_steps")


def load_prompts(tokenizer, count: int) -> list[dict]:
    lines = (HERE / "prompts" / "code.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    texts = [texts[i * len(texts) // count % len(texts)] for i in range(count)]
    return [{"prompt_token_ids": tokenizer(text).input_ids} for text in texts]


def one_round(engines: list[LLM], prompts: list[dict], batch_size: int, max_tokens: int):
    """([tokens per second per engine], [token ids per engine]); prefill is included.

    Engines take turns batch by batch: a shared machine's speed drifts within a round.
    """
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    seconds, said = [0.0] * len(engines), [[] for _ in engines]
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        for i, llm in enumerate(engines):
            llm.reset_prefix_cache()
            began = time.perf_counter()
            outputs = llm.generate(batch, sampling, use_tqdm=False)
            seconds[i] += time.perf_counter() - began
            said[i] += [list(output.outputs[0].token_ids) for output in outputs]
    return [len(prompts) * max_tokens / s for s in seconds], said


def counts(llm: LLM) -> list[float]:
    values = {m.name: m.value for m in llm.get_metrics() if m.name in COUNTERS}
    return [values.get(name, 0) for name in COUNTERS]


def summary(name: str, ratios: list[float]) -> str:
    return (
        f"{name}: {statistics.median(ratios):.2f}x plain "
        f"(min {min(ratios):.2f}, max {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "weights"))
    parser.add_argument("--config", type=json.loads, default={"method": "cerberus"})
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    common = {
        "model": args.model,
        "max_model_len": 1024,
        "max_num_seqs": max(8, args.batch_size),
        "kv_cache_memory_bytes": 2**28,
    }
    plain = LLM(**common)
    cerberus = LLM(**common, speculative_config=args.config, disable_log_stats=False)
    prompts = load_prompts(plain.get_tokenizer(), args.prompts)
    ask = [prompts, args.batch_size, args.max_tokens]
    one_round([plain, cerberus], *ask)
    before = counts(cerberus)
    rates, different = [], 0
    for _ in range(args.rounds):
        (a, b, c), said = one_round([plain, cerberus, plain], *ask)
        different = sum(x != y for x, y in zip(said[0], said[1], strict=True))
        rates.append((a, b, c))
        print(f"plain {a:.0f}, cerberus {b:.0f}, plain again {c:.0f} tokens/s", flush=True)
    tokens, steps = (y - x for x, y in zip(before, counts(cerberus), strict=True))
    print(summary("cerberus", [b / ((a + c) / 2) for a, b, c in rates]))
    print(summary("plain again", [c / a for a, _, c in rates]))
    print(f"{tokens / steps:.2f} tokens per request and step")
    print(f"{different} of {len(prompts)} answers differ from plain vLLM's (ties)")


if __name__ == "__main__":
    wanted = with_preloads(os.environ)
    if wanted.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    main()
