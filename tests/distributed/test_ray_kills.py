"""Processes killed under load: no answer in one piece is lost, every stream says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_kill.py"


def kill(kind, environment):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kill", kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sys.stdout.write(done.stdout)  # figures; `pytest -rP` shows them
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def environment():
    import os

    pytest.importorskip("ray")
    more = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return os.environ | more | {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("kind", ["actor", "engine", "worker"])
def test_a_kill_loses_no_answer_and_the_replica_comes_back(kind, environment):
    found = kill(kind, environment)
    assert found["requests"] > 50
    assert found["unary_failed"] == 0
    assert found["streams_ended_silently"] == 0
    assert found["healed_s"] is not None
