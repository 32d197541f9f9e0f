"""`train cerberus --self-generate`: the model's own words, and going on after a stop."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_accel.testing import write_tiny_model

pytestmark = pytest.mark.engine

REFERENCE = Path(__file__).parents[2] / "examples" / "reference_model"
VLLM_ACCEL = Path(sys.executable).with_name("vllm-accel")


@pytest.fixture
def model(tmp_path):
    """Two layers that know the reference model's words."""
    config = json.loads((REFERENCE / "weights" / "config.json").read_text())
    folder = write_tiny_model(tmp_path / "small", vocab_size=config["vocab_size"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "weights" / file, folder)
    return folder


def test_heads_are_trained_on_what_the_model_says(model, tmp_path):
    prompts = (REFERENCE / "prompts" / "code.jsonl").read_text().splitlines()
    text = "".join(json.loads(line)["prompt"] for line in prompts)
    (tmp_path / "text.txt").write_text(text)
    output = tmp_path / "heads"
    (output / "generation").mkdir(parents=True)
    kept = json.dumps({"prompt_ids": [5], "token_ids": [6, 7, 8, 9, 10, 11, 12]})
    # A run was killed while it wrote its second line.
    (output / "generation" / "continuations.jsonl").write_text(kept + '\n{"prompt_ids": [')
    options = ["--data", tmp_path / "text.txt", "--output", output, "--self-generate", "6"]
    command = [VLLM_ACCEL, "train", "cerberus", "--model", model, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (output / "generation" / "continuations.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0] == kept
    assert all(len(json.loads(line)["prompt_ids"]) == 96 for line in lines[1:])
    assert "# Cerberus draft heads for small" in (output / "README.md").read_text()
