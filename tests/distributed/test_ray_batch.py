"""A batch on two engines: killed half way, interrupted, gone on with."""

import json
import os
import re
import signal

import pytest

pytestmark = pytest.mark.distributed

ROWS = 256
TOKENS = 48
ENGINE_ARGS = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**27,
    "enforce_eager": True,
    "max_num_seqs": 16,
}


@pytest.fixture
def batch(accel, prompts, tmp_path):
    """(command, output) of 256 greedy prompts, each more than once."""
    texts = [prompt[:200] for prompt in prompts]
    rows = [{"prompt": texts[n % len(texts)]} for n in range(ROWS)]
    for row in rows:
        row["sampling_params"] = {"ignore_eos": True}
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.parquet"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = "examples/reference_model/weights"
    command = [*accel, "ray", "batch", "--model", model, "--replicas", "2"]
    command += ["--input", file, "--output", output, "--max-tokens", str(TOKENS)]
    command += ["--engine-args", json.dumps(ENGINE_ARGS), "--batch-size", "8"]
    return [*command, "--speculative-config", "cerberus"], output


def done(command):
    """Rows done, as the command says."""
    said = re.findall(rf"(\d+) of {ROWS} rows", command.said())
    return int(said[-1]) if said else 0


def check(output, rows=ROWS):
    from pyarrow import parquet

    table = parquet.read_table(output).to_pylist()
    assert [row["row"] for row in table] == list(range(rows))
    assert {row["error"] for row in table} == {""}
    assert {row["output_tokens"] for row in table} == {TOKENS}
    by_prompt = {}
    for row in table:  # whichever engine answered, and however often it was asked
        assert by_prompt.setdefault(row["prompt"], row["token_ids"]) == row["token_ids"]
    return table


@pytest.mark.parametrize("name", ["VLLM::EngineCore", "VLLM::Worker", "MapWorker"])
def test_an_engine_killed_half_way_loses_no_row(start, batch, tmp_path, name):
    command, output = batch
    with start(command, tmp_path / "log") as running:
        running.wait_for(lambda: done(running) >= ROWS // 4)
        found = running.below(name)
        assert found, running.said()[-4000:]
        os.kill(found[0].pid, signal.SIGKILL)
        assert done(running) < ROWS
        assert running.process.wait(timeout=600) == 0, running.said()[-4000:]
    check(output)


def test_an_interrupted_batch_goes_on_where_it_was(start, batch, tmp_path):
    command, output = batch
    with start(command, tmp_path / "first") as running:
        running.wait_for(lambda: done(running) >= ROWS // 4)
        assert running.stop(signal.SIGINT) == 130
        assert "goes on from here" in running.said()
    assert not output.exists()
    with start(command, tmp_path / "second") as running:
        assert running.process.wait(timeout=600) == 0, running.said()[-4000:]
        before = int(re.search(r"rows, (\d+) done before", running.said()).group(1))
        assert before >= ROWS // 4
    check(output)


def test_tokens_are_the_offline_engines(start, batch, tmp_path, offline, tokenizer):
    command, output = batch
    with start(command, tmp_path / "log") as running:
        assert running.process.wait(timeout=600) == 0, running.said()[-4000:]
    table = check(output)[:8]
    plain = offline([tokenizer(row["prompt"]).input_ids for row in table], TOKENS)
    assert [row["token_ids"] for row in table] == [p["token_ids"] for p in plain]
