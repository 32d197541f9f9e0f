"""Engines in processes of their own, and the models they serve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_accel.testing import write_tiny_model, write_untrained_heads

HERE = Path(__file__).parent
REFERENCE = HERE.parents[1] / "examples" / "reference_model" / "weights"

# Split-KV off: see the law in the README.
ENVIRONMENT = {
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def run_python():
    """run_python(arguments, env={}, text="") -> CompletedProcess, in the tests' world."""

    def run(arguments, *, env=None, text="", timeout=600):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | ENVIRONMENT | (env or {}),
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def printed(run_python):
    """printed(arguments, env={}) -> what a script printed as JSON after RESULT."""

    def run(arguments, env=None):
        done = run_python(arguments, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [s for s in done.stdout.splitlines() if s.startswith("RESULT ")]
        return json.loads(lines[-1].removeprefix("RESULT "))

    return run


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """The process of run_engine.py."""
    log = tmp_path_factory.mktemp("engines") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, HERE / "run_engine.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
    yield process
    process.communicate()


@pytest.fixture(scope="session")
def generate(tmp_path_factory, engines):
    """generate(engine_arguments, batches, ...) -> {"batches", "metrics", ...}.

    With `processes` the worker has one of its own, as by default outside of tests, and
    steps may be queued ahead.
    """

    def run(engine, batches, env=None, *, processes=False):
        folder = tmp_path_factory.mktemp("engine")
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)), **(env or {})}
        defaults = {
            "max_model_len": 512,
            "kv_cache_memory_bytes": 2**27,
            "enforce_eager": True,
            "seed": 0,
        }
        task = {"folder": str(folder), "env": env, "batches": batches}
        order = json.dumps(task | {"engine": defaults | engine})
        print(order, file=engines.stdin, flush=True)
        status = engines.stdout.readline()
        assert status == "0\n", f"{status} {(folder / 'log').read_text()[-4000:]}"
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture(scope="session")
def reference_model():
    return str(REFERENCE)


@pytest.fixture(scope="session")
def reference_prompts():
    """Token ids of held-out code, as many prompts as are asked for, of mixed lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    lines = (REFERENCE.parent / "prompts" / "code.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model folder, heads folder): random weights, heads that repeat the next token."""
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny_model(folder / "model")
    return str(model), str(write_untrained_heads(folder / "heads", model))
