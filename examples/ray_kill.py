"""What do clients notice when a replica, its engine or its worker is killed?

    python examples/ray_kill.py --kill engine
    python examples/ray_kill.py --kill engine --stock

Two replicas on this machine, four clients, every other request a stream. One process is
killed with SIGKILL while they ask. Prints one JSON object: requests and failures by kind,
seconds until Serve knew, seconds until two replicas were up again. `--stock` is Ray Serve
LLM without our server and ingress, all else equal. `--kill nothing` gives tokens per
second; with `--replicas 1` one engine has all the cores that two would share.
"""

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from openai import OpenAI, OpenAIError

from vllm_accel.ray import app, cluster
from vllm_accel.ray.cluster import Where
from vllm_accel.ray.settings import ReplicaSettings

MODEL = Path(__file__).parent / "reference_model" / "weights"
NAME = "reference"
TOKENS = 32
TOLD = (OpenAIError, httpx2.HTTPError)
"""What the client raises: a failure it notices."""


@dataclass
class Traffic:
    """Clients that ask until they are stopped, and what became of what they asked."""

    url: str
    threads: int
    client_retries: int = 0
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    """("unary" or "stream", "ok", "error" or "silent"), one per request that ended"""

    def __enter__(self):
        self.stopped = threading.Event()
        self.clients = [
            threading.Thread(target=self._ask_on, args=(n,)) for n in range(self.threads)
        ]
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for client in self.clients:
            client.join()

    def _ask_on(self, number):
        client = OpenAI(
            base_url=self.url, api_key="none", max_retries=self.client_retries, timeout=300
        )
        turn = number
        while not self.stopped.is_set():
            kind = ("unary", "stream")[turn % 2]
            self.outcomes.append((kind, getattr(self, kind)(client, turn)))
            turn += 1

    def ask(self, client, turn, **more):
        return client.completions.create(
            model=NAME,
            prompt=f"def function_{turn % 7}(value):\n",
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
            **more,
        )

    def unary(self, client, turn):
        try:
            answer = self.ask(client, turn)
        except TOLD:
            return "error"
        return "ok" if answer.choices[0].finish_reason else "silent"

    def stream(self, client, turn):
        """An error that is told is not the same as an end that says nothing."""
        reasons = []
        try:
            for part in self.ask(client, turn, stream=True):
                reasons += [choice.finish_reason for choice in part.choices]
        except TOLD:
            return "error"
        return "ok" if any(reasons) else "silent"


def engines():
    """Engine cores below this process, with a worker each."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if "VLLM::EngineCore" in title(p)]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def victim(kind):
    """One process of the first replica."""
    engine = engines()[0]
    if kind == "engine":
        return engine
    if kind == "actor":
        return engine.parent()
    return next(p for p in engine.children() if "VLLM::Worker" in title(p))


def states(serve):
    """How many replicas of the model are in which state."""
    deployments = serve.status().applications["app"].deployments
    (model,) = [d for name, d in deployments.items() if "Ingress" not in name]
    return {state: n for state, n in model.replica_states.items() if n}


def application(settings, *, stock):
    from ray.serve.llm import build_openai_app

    args = app.serving_args(settings)
    if stock:
        del args["ingress_cls_config"], args["llm_configs"][0]["server_cls"]
    return build_openai_app(args)


def kill(serve, options):
    """Kills; seconds until Serve knew, and until all replicas ran again."""
    if options.kill == "nothing":
        return None, None
    os.kill(victim(options.kill).pid, signal.SIGKILL)
    killed_at = time.time()
    detected = None
    while time.time() - killed_at < options.most:
        now = states(serve)
        if detected is None and now != {"RUNNING": options.replicas}:
            detected = time.time() - killed_at
        elif detected is not None and now == {"RUNNING": options.replicas}:
            return detected, time.time() - killed_at
        time.sleep(0.1)
    return detected, None


def run(options):
    settings = ReplicaSettings(
        model=options.model,
        name=NAME,
        replicas=options.replicas,
        speculative_config=options.speculative_config,
        engine_args={
            "max_model_len": 512,
            "kv_cache_memory_bytes": 2**27,
            "enforce_eager": True,
        },
    )
    with cluster.connected(Where(logs=False)):
        from ray import serve

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        began = time.time()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(settings, stock=options.stock), name="app")
        ready_s = time.time() - began
        url = f"http://127.0.0.1:{port}/v1"
        with Traffic(url, options.clients, options.client_retries) as traffic:
            time.sleep(options.before)  # the first answers of a replica are slow
            traffic.outcomes.clear()
            counted_from = time.time()
            time.sleep(2)
            times = kill(serve, options)
            time.sleep(max(0.0, options.seconds - (time.time() - counted_from)))
            counted_s = time.time() - counted_from
            outcomes = Counter(traffic.outcomes)
        serve.shutdown()
    return report(options, outcomes, counted_s, ready_s, *times)


def report(options, outcomes, counted_s, ready_s, detected_s, healed_s):
    tokens = TOKENS * (outcomes["unary", "ok"] + outcomes["stream", "ok"])
    return {
        "killed": options.kill,
        "setup": "stock" if options.stock else "ours",
        "replicas": options.replicas,
        "clients": options.clients,
        "client_retries": options.client_retries,
        "requests": outcomes.total(),
        "unary_failed": outcomes["unary", "error"] + outcomes["unary", "silent"],
        "streams_ended_by_an_error": outcomes["stream", "error"],
        "streams_ended_silently": outcomes["stream", "silent"],
        "ready_s": round(ready_s, 1),
        "detected_s": detected_s and round(detected_s, 1),
        "healed_s": healed_s and round(healed_s, 1),
        "tokens_per_s": round(tokens / counted_s, 1),
    }


def main():
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line per request
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kill", choices=("actor", "engine", "worker", "nothing"), default="engine")
    add("--stock", action="store_true")
    add("--model", default=str(MODEL))
    add("--speculative-config", default="cerberus")
    add("--replicas", type=int, default=2)
    add("--clients", type=int, default=4)
    add("--client-retries", type=int, default=0)
    add("--before", type=float, default=10, help="seconds of traffic before it counts")
    add("--seconds", type=float, default=75, help="of traffic that counts, at least")
    add("--most", type=float, default=240, help="seconds to wait for a healed app")
    print(json.dumps(run(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
