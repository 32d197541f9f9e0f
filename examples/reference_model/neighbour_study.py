"""What a long prompt costs the request that decodes beside it, and how much memory.

    python neighbour_study.py MODEL --length 4096 --repeats 5

A short request decodes; in its midst a long prompt arrives. Its longest wait for a token,
the long prompt's first token, and the most memory a worker ever held: vLLM as it is, with
steps as large as lazyllm has them, and with lazyllm.
"""

import argparse
import random
import statistics
import time
from itertools import pairwise

import psutil
from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input

WAYS = {
    "plain": {},
    "plain, steps of 8192": {"max_num_batched_tokens": 8192},
    "lazyllm": {"additional_config": {"lazyllm": {}}},
}
SHORT, ALONE = 32, 40


def meet(engine, length: int, seed: int) -> tuple[float, float]:
    """Seconds: the longest wait of the short request, and to the long one's first token."""
    rng = random.Random(seed)
    short, long = ([rng.randrange(10, 8000) for _ in range(n)] for n in (SHORT, length))
    engine.add_request(f"short{seed}", tokens_input(short), _sampling(3 * ALONE))
    seen, begun, first = [], 0.0, 0.0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        seen += [now for o in outputs if o.request_id.startswith("short")]
        if begun and not first and any(o.request_id.startswith("long") for o in outputs):
            first = now - begun
        if len(seen) == ALONE and not begun:
            begun = time.perf_counter()
            engine.add_request(f"long{seed}", tokens_input(long), _sampling(2))
    return max(b - a for a, b in pairwise(seen)), first


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )


def most_memory() -> int:
    """MiB: the largest resident set that any process of the engine has had."""
    peaks = []
    for process in psutil.Process().children(recursive=True):
        with open(f"/proc/{process.pid}/status") as status:
            peaks += [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return max(peaks) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    for name, more in WAYS.items():
        llm = LLM(
            options.model,
            dtype=options.dtype,
            max_model_len=options.length + 2,
            max_num_seqs=8,
            kv_cache_memory_bytes=2**28,
            enable_prefix_caching=False,
            **more,
        )
        meet(llm.llm_engine, options.length, 0)  # not counted
        met = [meet(llm.llm_engine, options.length, 1 + n) for n in range(options.repeats)]
        for what, seconds in zip(
            ("longest wait", "first token"), zip(*met, strict=True), strict=True
        ):
            low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
            print(f"{name}: {what} {middle:.2f} s ({low:.2f} to {high:.2f})")
        print(f"{name}: {most_memory()} MiB at the most in one process")
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
