"""What starts replicas and how that ends: YAML, refusals at the start, SIGTERM."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def test_yaml_is_served_by_rays_own_command(start, tmp_path):
    import httpx
    from openai import OpenAI

    command = [Path(sys.executable).with_name("serve"), "run", "examples/ray_serve.yaml"]
    with start(command, tmp_path / "log") as served:

        def up():
            try:
                return httpx.get("http://127.0.0.1:8000/v1/models").status_code == 200
            except httpx.TransportError:
                return False

        served.wait_for(up)
        url = "http://127.0.0.1:8000/v1"
        client = OpenAI(base_url=url, api_key="none", timeout=300)
        answer = client.completions.create(
            model="reference", prompt="def main():", max_tokens=8, temperature=0
        )
        assert answer.usage.completion_tokens > 0


def test_what_cannot_start_ends_in_one_line(start, accel, tmp_path):
    config = json.dumps({"method": "cerberus", "model": str(tmp_path)})
    arguments = [*accel, "ray", "serve", "--speculative-config", config]
    arguments += ["--model", "examples/reference_model/weights", "--port", "8001"]
    with start(arguments, tmp_path / "log") as command:
        assert command.process.wait(timeout=300) == 2
        (line,) = [s for s in command.said().splitlines() if s.startswith("vllm-accel: ")]
        assert line.startswith("vllm-accel: error: The replicas did not start (")
        assert str(tmp_path) in line


def test_sigterm_takes_everything_down(serve, tmp_path):
    with serve(tmp_path / "log") as command:
        processes = command.below("")
        assert len(command.below("VLLM::Worker")) == 2
        assert command.stop(signal.SIGTERM) == 0
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(map(is_alive, processes)):
            time.sleep(0.5)
        assert [p for p in processes if is_alive(p)] == []


def is_alive(process):
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
