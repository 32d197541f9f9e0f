"""Two ranks: the first one's word counts, so a gate that tosses coins does not hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
REFERENCE = HERE.parents[1] / "examples" / "reference_model"


def ask(tmp_path, name, **more):
    prompts = (REFERENCE / "prompts" / "code.jsonl").read_text().splitlines()[:4]
    engine = {
        "model": str(REFERENCE / "weights"),
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**27,
        **more,
    }
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "weights")
    ids = [tokenizer(json.loads(line)["prompt"]).input_ids[:120] for line in prompts]
    sampling = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
    task = {"engine": engine, "batches": [{"prompts": ids, "sampling": [sampling] * 4}]}
    result = tmp_path / f"{name}.json"
    environment = {"VLLM_CPU_ATTN_SPLIT_KV": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "engine" / "run_engine.py"), str(result)],
        input=json.dumps(task),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def tokens(result):
    return [r["token_ids"] for r in result["batches"][0]]


@pytest.mark.parametrize("gate", ["vllm_accel.testing:CoinGate", "goodput"])
def test_two_ranks_draft_as_one_and_say_what_plain_ranks_say(tmp_path, gate):
    plain = ask(tmp_path, "plain")
    config = {"method": "cerberus", "gate": gate}
    found = ask(tmp_path, "cerberus", speculative_config=config)
    assert tokens(found) == tokens(plain)
    assert found["metrics"]["vllm:accel_accepted_tokens"] > 0
