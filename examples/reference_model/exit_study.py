"""What an exit gives at most, by layer, where its time goes, and what kept states save.

    python exit_study.py MODEL --exit-layers '[2, 3, 4, 6]' --prompts prompts/code.jsonl

Every draft is made and final (mode `exit`, gate `always`), so agreement plays no part: the
most that any training could reach. Engines take turns, plain vLLM first in each round;
`recomputed` is the same exit whose kept states are forgotten before the deep layers run.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to the worker

from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input

from vllm_accel.bench.engine import Decoded, tokens_per_s

PARTS = ("drafting", "contexts", "last rows", "deep layers", "rest")
"""First layers with the exit's head, row by row; what tells vLLM's attention where these
are; the first layers of the rows behind the drafts; the deep layers of all; all else."""


def watch(worker) -> None:
    """Counts the seconds of the parts of a step, in the worker."""
    from vllm_accel.host.v1 import free_runner

    runner, seconds = worker.model_runner, dict.fromkeys(PARTS, 0.0)
    runner.part_seconds, proposer = seconds, runner.drafter

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - began

        return call

    proposer.read = timed("drafting", proposer.read)
    proposer.shallow = timed("last rows", proposer.shallow)
    proposer.deepen = timed("deep layers", proposer.deepen)
    context = free_runner.SpanContext
    context.move_to = timed("contexts", context.move_to)
    free_runner.SpanContext = timed("contexts", context)
    stacks = proposer.stacks
    runner.kept_rows = stacks.kept_rows


def forget(worker, yes: bool) -> None:
    """Whether the deep layers find no kept state, and the whole model runs."""
    runner = worker.model_runner
    runner.drafter.stacks.kept_rows = (lambda *_: []) if yes else runner.kept_rows


def parts(worker) -> dict[str, float]:
    """Seconds since the last call."""
    seconds = worker.model_runner.part_seconds
    found = dict(seconds)
    seconds.update(dict.fromkeys(PARTS, 0.0))
    return found


class Way:
    """One engine, one way to use it, and what was measured."""

    def __init__(self, llm: LLM, exit_layer: int | None, recomputed: bool) -> None:
        self.llm, self.exit_layer, self.recomputed = llm, exit_layer, recomputed
        self.name = "plain" if exit_layer is None else f"exit {exit_layer}"
        self.name += ", recomputed" * recomputed
        self.rates: list[float] = []
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.steps = 0

    def ask(self, batches: list[list[list[int]]], max_tokens: int, keep: bool) -> None:
        """A turn."""
        if self.exit_layer is not None:
            self.llm.collective_rpc(forget, args=(self.recomputed,))
            self.llm.collective_rpc(parts)
        decoded, steps, seconds = [], 0, 0.0
        for batch in batches:
            answered = answer(self.llm, batch, max_tokens)
            decoded.append(Decoded.of(answered, len(batch)))
            steps += len(answered) - 1
            seconds += answered[-1][0] - answered[0][0]
        found = {} if self.exit_layer is None else self.llm.collective_rpc(parts)[0]
        time.sleep(1.1)  # vLLM's processes spin for a second before they sleep
        if keep:
            self.rates.append(tokens_per_s(decoded))
            self.steps += steps
            found["rest"] = seconds - sum(found.values())
            for name, value in found.items():
                self.seconds[name] += value

    def per_step(self) -> dict[str, float]:
        """Milliseconds; the prompts' own steps run no part but some of `rest`."""
        return {name: round(1e3 * s / self.steps, 2) for name, s in self.seconds.items()}


def answer(llm: LLM, batch: list[list[int]], max_tokens: int) -> list:
    """Per step: seconds since the batch was asked, new tokens by request."""
    engine = llm.llm_engine
    engine.reset_prefix_cache()
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    params.output_kind = params.output_kind.DELTA
    began = time.perf_counter()
    for i, prompt in enumerate(batch):
        engine.add_request(str(i), tokens_input(prompt), params)
    steps = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        given = {int(o.request_id): list(o.outputs[0].token_ids) for o in outputs}
        if any(given.values()):
            steps.append((time.perf_counter() - began, given))
    return steps


def ideal(num_layers: int, exit_layer: int, left: float) -> float:
    """FREE's own: L_D over layers run, where rows of the deep layers cost one."""
    return num_layers / (exit_layer + (1 - left) * (num_layers - exit_layer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--exit-layers", type=json.loads, default=[2, 3, 4, 6])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=4, help="of each round")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    ways = started(options)
    prompts = read(options.prompts, ways[0].llm.get_tokenizer())
    for n in range(-1, options.rounds):  # one round to warm up
        first = max(0, n) * options.num_prompts
        asked = [prompts[(first + i) % len(prompts)] for i in range(options.num_prompts)]
        size = options.batch_size
        batches = [asked[i : i + size] for i in range(0, len(asked), size)]
        for way in ways:
            way.ask(batches, options.max_tokens, keep=n >= 0)
    tell(ways, options.draft_tokens)


def started(options: argparse.Namespace) -> list[Way]:
    """Plain vLLM, and each exit twice."""
    common = {
        "dtype": options.dtype,
        "max_model_len": 1024,
        "max_num_seqs": max(8, options.batch_size),
        "kv_cache_memory_bytes": 2**28,
    }
    ways = [Way(LLM(options.model, **common), None, False)]
    for layer in options.exit_layers:
        config = {
            "method": "free",
            "mode": "exit",
            "gate": "always",
            "exit_layer": layer,
            "num_speculative_tokens": options.draft_tokens,
        }
        llm = LLM(options.model, speculative_config=config, **common)
        llm.collective_rpc(watch)
        ways += [Way(llm, layer, False), Way(llm, layer, True)]
    return ways


def read(file: Path, tokenizer) -> list[list[int]]:
    """Token ids of each prompt."""
    texts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    return [tokenizer.encode(text) for text in texts]


def tell(ways: list[Way], draft_tokens: int) -> None:
    """A line per way: rate over plain's of the same round, share of FREE's ideal."""
    plain = ways[0]
    num_layers = plain.llm.model_config.get_total_num_hidden_layers()
    left = draft_tokens / (draft_tokens + 1)
    for way in ways:
        ratios = [a / b for a, b in zip(way.rates, plain.rates, strict=True)]
        middle = statistics.median(ratios)
        line = f"{way.name}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if way.exit_layer is not None:
            best = ideal(num_layers, way.exit_layer, left)
            line += f", ideal {best:.2f}, share {middle / best:.2f}"
        print(line, "| ms a step", way.per_step())


if __name__ == "__main__":
    main()
