"""The short examples run as they are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(command, **env):
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", ["offline_cerberus.py", "offline_free.py"])
def test_offline(name):
    done = run([sys.executable, str(EXAMPLES / name)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "def load_config(" in done.stdout
    assert "vllm:accel_request_steps" in done.stdout


def test_a_long_prompt_dense_and_pruned():
    done = run([sys.executable, str(EXAMPLES / "offline_lazyllm.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "keep 0.1: " in done.stdout
    assert "'state': 'parked'" in done.stdout


def test_serve_ask_and_stop():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # As in the demo, which then finds the model compiled: the cache is by environment.
    env = {"PORT": str(port), "VLLM_CPU_ATTN_SPLIT_KV": "0"}
    done = run(["bash", str(EXAMPLES / "serve_cerberus.sh")], **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert '"finish_reason":"length"' in done.stdout
    assert "vllm:accel_gate_decisions_total" in done.stdout


@pytest.mark.parametrize("name", [file.name for file in EXAMPLES.glob("offline_*.py")])
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 50
