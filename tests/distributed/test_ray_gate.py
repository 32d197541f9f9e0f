"""A replica that takes a dead one's place starts from what the other's gate learnt."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

WARM = "the gate starts from"


def states(folder):
    return sorted(Path(folder).glob("vllm_accel_gates_*/*/*.json"))


@pytest.fixture
def folder():
    """Of temporary files; short, as vLLM's sockets are there too."""
    with tempfile.TemporaryDirectory(prefix="gate") as name:
        yield name


def test_a_new_replica_starts_warm(serve, folder, tmp_path):
    from openai import OpenAI

    options = ["--speculative-config", "cerberus", "--share-gate"]
    with serve(tmp_path / "log", *options, "--env", f"TMPDIR={folder}") as command:
        client = OpenAI(base_url=command.url, api_key="none", timeout=300)

        def learnt():
            """Both gates write ten seconds apart, under load only."""
            client.completions.create(model="reference", prompt=["def f(a):"] * 4)
            return len(states(folder)) == 2

        command.wait_for(learnt, seconds=120)
        assert not command.logged(WARM)
        time.sleep(10)  # actors look every five seconds
        for file in states(folder):  # what is there after this came from the board
            file.unlink()
        os.kill(command.below("VLLM::EngineCore")[0].pid, signal.SIGKILL)
        command.wait_for(lambda: command.logged(WARM), seconds=240)
