"""`vllm-accel train cerberus`, really: a few steps, killed, resumed, loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_accel.cerberus import checkpoint

REFERENCE = Path(__file__).parents[2] / "examples" / "reference_model"
VLLM_ACCEL = Path(sys.executable).with_name("vllm-accel")


@pytest.fixture
def command(tmp_path):
    """The command for 12 steps with a checkpoint after every second."""
    prompts = (REFERENCE / "prompts" / "code.jsonl").read_text().splitlines()
    text = "".join(json.loads(line)["prompt"] for line in prompts)
    (tmp_path / "text.txt").write_text(text)
    options = ["--row-tokens", "64", "--batch-size", "8", "--held-out-rows", "8"]
    options += ["--save-steps", "2", "--epochs", "1", "--draft-tokens", "2"]
    where = ["--model", REFERENCE / "weights", "--data", tmp_path / "text.txt"]
    return [*map(str, [VLLM_ACCEL, "train", "cerberus", *where]), *options]


def run(command, output):
    return subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, check=False
    )


def test_heads_are_trained_measured_and_fit_their_base(command, tmp_path):
    done = run(command, tmp_path / "heads")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "heads" / "metrics.json").read_text())
    assert len(figures["top1"]) == len(figures["top5"]) == 2
    assert figures["held_out_tokens"] > 50
    config = checkpoint.load_config(tmp_path / "heads")
    accepted = checkpoint.check_against_base(tmp_path / "heads", REFERENCE / "weights")
    assert accepted == pytest.approx(config.accepted_per_step, abs=0.1)


def test_medusa_heads_are_written_for_vllm_too(command, tmp_path):
    more = ["--heads", "medusa", "--targets", "base", "--draft-vocab", "500"]
    done = run([*command, *more, "--license", "mit"], tmp_path / "heads")
    assert done.returncode == 0, done.stderr[-3000:]
    config = checkpoint.load_config(tmp_path / "heads")
    assert (config.blocks, config.cross_links, config.draft_vocab_size) == (1, False, 500)
    theirs = json.loads((tmp_path / "heads" / "vllm_medusa" / "config.json").read_text())
    assert (theirs["model_type"], theirs["num_heads"]) == ("medusa", 2)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "license: mit" in card
    assert "`text.txt`" in card


def test_a_killed_run_goes_on_from_its_last_checkpoint(command, tmp_path):
    output = tmp_path / "heads"
    killed = subprocess.Popen(
        [*command, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert killed.poll() is None
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (output / "model.safetensors").exists()
    resumed = run(command, output)
    whole = run(command, tmp_path / "whole")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:]
    folders = (output, tmp_path / "whole")
    a, b = (json.loads((f / "metrics.json").read_text()) for f in folders)
    assert a["top5"] == pytest.approx(b["top5"], abs=0.02)
