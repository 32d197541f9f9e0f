"""How many long requests run at once in a KV-cache pool that fits so many dense ones.

    python pool_study.py MODEL --length 4096 --dense 4 --requests 16

All requests are handed over at once; every step tells how many of them run. Dense runs
first, then LazyLLM in a pool of as many bytes.
"""

import argparse
import json
import random
import time

from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

LAZY_PAGE = 64


class Counts(AggregateStatLoggerBase):
    """Requests that run, by step, and preemptions."""

    def __init__(self) -> None:
        self.running: list[int] = []
        self.preemptions = 0

    def record(self, scheduler_stats, iteration_stats, *args, **kwargs) -> None:
        """See `StatLoggerBase.record`."""
        if scheduler_stats is not None:
            self.running.append(scheduler_stats.num_running_reqs)
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def crowd(options: argparse.Namespace, num_bytes: int, **more: object) -> dict:
    """Asks everything at once."""
    length = options.length - options.max_tokens
    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.length,
        max_num_seqs=options.requests,
        kv_cache_memory_bytes=num_bytes,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **more,
    )
    engine, counts = llm.llm_engine, Counts()
    engine.logger_manager.stat_loggers = [counts]
    rng = random.Random(0)
    params = SamplingParams(
        temperature=0, max_tokens=options.max_tokens, ignore_eos=True, detokenize=False
    )
    began = time.perf_counter()
    for i in range(options.requests):
        prompt = [rng.randrange(10, 8000) for _ in range(length)]
        engine.add_request(str(i), tokens_input(prompt), params)
    while engine.has_unfinished_requests():
        engine.step()
    took = time.perf_counter() - began
    engine.engine_core.shutdown()
    most = max(counts.running)
    return {"most_at_once": most, "preemptions": counts.preemptions, "seconds": took}


def pool_bytes(model: str, length: int, dense: int, dtype: str) -> int:
    """KV cache of so many dense requests, in vLLM's pages of 128, and its null page."""
    with open(f"{model}/config.json") as file:
        config = json.load(file)
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    itemsize = 4 if dtype == "float32" else 2
    page = 128 * layers * heads * config["head_dim"] * 2 * itemsize
    return (dense * -(-length // 128) + 1) * page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096, help="prompt and answer")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dense", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lazyllm", type=json.loads, default={})
    options = parser.parse_args()
    num_bytes = pool_bytes(options.model, options.length, options.dense, options.dtype)
    print("dense", crowd(options, num_bytes))
    for name, more in (("lazyllm", {}), ("by pages", {"granularity": "page"})):
        settings = {"lazyllm": options.lazyllm | more}
        found = crowd(options, num_bytes, block_size=LAZY_PAGE, additional_config=settings)
        print(name, found)


if __name__ == "__main__":
    main()
