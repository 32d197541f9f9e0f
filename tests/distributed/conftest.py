"""Replicas on Ray, started by the commands a person would type."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REFERENCE = ROOT / "examples" / "reference_model"
MODEL = REFERENCE / "weights"

# As in the law's test: split-KV off in both engines, so that tokens are equal exactly.
ENVIRONMENT = {
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# What each of two replicas has on two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENGINE_ARGS = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**27,
    "enforce_eager": True,
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Command:
    """A command that keeps running, its log, and the processes below it."""

    def __init__(self, arguments, log, **environment):
        self.log = log
        # Unix sockets must have short names, so not below pytest's folder.
        self.folder = tempfile.mkdtemp(prefix="ray")
        self.process = subprocess.Popen(
            list(map(str, arguments)),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"RAY_TMPDIR": self.folder} | environment,
        )

    def said(self):
        """What it has logged so far, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def logged(self, text):
        """Whether any process of its Ray has logged a text."""
        files = [f for f in Path(self.folder).rglob("logs/**/*") if f.is_file()]
        return any(text in f.read_text(errors="replace") for f in [self.log, *files])

    def wait_for(self, condition, seconds=400):
        """What the condition gives, once it gives something."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := condition():
                return found
            assert self.process.poll() is None, self.said()[-4000:]
            time.sleep(0.5)
        raise AssertionError(self.said()[-4000:])

    def below(self, name):
        """Processes below this one whose title has a name in it, the oldest first."""
        import psutil

        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        found = [p for p in processes if name in title(p)]
        return sorted(found, key=lambda p: p.create_time())

    def stop(self, number=signal.SIGINT):
        """Its exit code, after at most a minute."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def title(process):
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def running(arguments, log, **environment):
    command = Command(arguments, log, **environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.stop()


@pytest.fixture(scope="session")
def start():
    """start(arguments, log, **environment): a context manager of a running `Command`."""
    pytest.importorskip("ray")
    return running


@pytest.fixture(scope="session")
def accel():
    """The command `vllm-accel`, in this environment's Python."""
    return [sys.executable, "-m", "vllm_accel.cli"]


@pytest.fixture(scope="session")
def serve(start, accel):
    """serve(log, *options): like `start`, up when it says so; `url`, `metrics_url`."""

    @contextmanager
    def served(log, *options, **environment):
        port, metrics_port = free_port(), free_port()
        arguments = [*accel, "ray", "serve", "--model", MODEL, "--name", "reference"]
        arguments += ["--replicas", "2", "--port", port, "--metrics-port", metrics_port]
        arguments += ["--engine-args", json.dumps(ENGINE_ARGS), *options]
        with start(arguments, log, **environment) as command:
            command.url = f"http://127.0.0.1:{port}/v1"
            command.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
            command.wait_for(lambda: "2 replicas of reference at" in command.said())
            yield command

    return served


@pytest.fixture(scope="session")
def prompts():
    """Texts of held-out code."""
    lines = (REFERENCE / "prompts" / "code.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"][:300] for line in lines]


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """run_engine(engine arguments, batch, **environment) -> its result, by one engine."""

    def run(engine, batch, **environment):
        folder = tmp_path_factory.mktemp("engine")
        task = {"folder": str(folder), "env": {}, "engine": engine, "batches": [batch]}
        done = subprocess.run(
            [sys.executable, str(HERE.parent / "engine" / "run_engine.py")],
            input=f"{json.dumps(task)}\n",
            env=os.environ | ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        log = folder / "log"
        said = log.read_text() if log.exists() else done.stderr
        assert done.stdout == "0\n", said[-4000:]
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture(scope="session")
def offline(run_engine):
    """offline(token_ids, max_tokens) -> [{token_ids, text}] of plain vLLM, one engine."""

    def ask(prompts, max_tokens):
        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
        batch = {"prompts": prompts, "sampling": [sampling] * len(prompts)}
        engine = {"model": str(MODEL), **ENGINE_ARGS}
        return run_engine(engine, batch, **ONE_THREAD)["batches"][0]

    return ask


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)
