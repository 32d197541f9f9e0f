"""Two real servers, one plain, one with cerberus: same tokens, how much faster?

    make demo            (or: python examples/demo.py --rounds 5)

Starts `vllm serve MODEL` and `vllm serve MODEL --speculative-config cerberus`, asks both
the same held-out prompts over the OpenAI API, compares the greedy answers, streams one,
and measures both in turns, one request at a time.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from vllm_accel.serve import with_preloads

HERE = Path(__file__).resolve().parent
MODEL = HERE / "reference_model" / "weights"
PROMPTS = HERE / "reference_model" / "prompts" / "code.jsonl"
OPTIONS = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]


class Server:
    """One `vllm serve` and a client for it."""

    def __init__(self, name: str, options: list[str], log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.name, self.log = name, log
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        command = ["vllm", "serve", str(MODEL), *OPTIONS, *options]
        print("$", " ".join(command))
        command[0] = str(Path(sys.executable).with_name("vllm"))
        self.process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=with_preloads(os.environ),
        )

    def wait(self) -> None:
        while True:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(1)

    def ask(self, prompt: str, max_tokens: int, **more):
        return self.client.completions.create(
            model=str(MODEL),
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            **more,
        )

    def counter(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        families = text_string_to_metric_families(text)
        samples = [s for family in families for s in family.samples]
        return sum(s.value for s in samples if s.name == name)


@contextmanager
def servers(log_folder: Path):
    # One CPU attention kernel rounds a lone row by an ulp otherwise than a batched one;
    # without split-KV both servers round alike and the comparison below can be exact.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    plain = Server("plain", [], log_folder / "plain.log")
    plain.wait()
    options = ["--speculative-config", "cerberus"]
    cerberus = Server("cerberus", options, log_folder / "cerberus.log")
    cerberus.wait()
    try:
        yield plain, cerberus
    finally:
        for server in (plain, cerberus):
            server.process.terminate()
        for server in (plain, cerberus):
            server.process.wait(timeout=60)


def compare(plain: Server, cerberus: Server, prompts: list[str], max_tokens: int):
    different = 0
    for prompt in prompts:
        ours = cerberus.ask(prompt, max_tokens).choices[0]
        theirs = plain.ask(prompt, max_tokens).choices[0]
        different += ours.token_ids != theirs.token_ids
    streamed = "".join(
        part.choices[0].text
        for part in cerberus.ask(prompts[0], max_tokens, stream=True)
        if part.choices
    )
    different += streamed != plain.ask(prompts[0], max_tokens).choices[0].text
    print(f"\n{len(prompts)} prompts, greedy: {different} answers differ from plain vLLM")
    return different


def tokens_per_s(server: Server, prompts: list[str], max_tokens: int) -> float:
    """Decode rate, from the first streamed token on: prefill is not what differs."""
    seconds, tokens = 0.0, 0
    for prompt in prompts:
        stream = server.ask(prompt, max_tokens, stream=True)
        arrived = [(time.perf_counter(), len(c.choices[0].token_ids)) for c in stream]
        seconds += arrived[-1][0] - arrived[0][0]
        tokens += sum(n for _, n in arrived[1:])
    return tokens / seconds


def measure(plain, cerberus, prompts, max_tokens: int, rounds: int) -> None:
    rates = {plain.name: [], cerberus.name: []}
    before = [cerberus.counter(f"vllm:accel_{n}_total") for n in COUNTERS]
    for number in range(rounds):
        for server in (plain, cerberus):
            rates[server.name].append(tokens_per_s(server, prompts, max_tokens))
        print(
            f"round {number + 1}/{rounds}: "
            + ", ".join(f"{name} {r[-1]:.0f} tokens/s" for name, r in rates.items())
        )
    after = [cerberus.counter(f"vllm:accel_{n}_total") for n in COUNTERS]
    tokens, steps = (b - a for a, b in zip(before, after, strict=True))
    ratios = sorted(c / p for p, c in zip(*rates.values(), strict=True))
    print(
        f"\ncerberus over plain vLLM (compiled), one request at a time, {max_tokens} "
        f"tokens: {statistics.median(ratios):.2f}x (min {ratios[0]:.2f}, "
        f"max {ratios[-1]:.2f}, {rounds} rounds); {tokens / steps:.2f} tokens per step"
    )


COUNTERS = ("output_tokens", "request_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    lines = PROMPTS.read_text().splitlines()
    step = max(1, len(lines) // args.prompts)
    prompts = [json.loads(line)["prompt"] for line in lines[::step]][: args.prompts]
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as both:
        different = compare(*both, prompts, args.max_tokens)
        measure(*both, prompts, args.max_tokens, args.rounds)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
