"""Medusa heads: others' in our runtime, ours in vLLM's own; and a limited vocabulary."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vllm_accel.cerberus import checkpoint, medusa
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.on_disk import base_model, files

pytestmark = pytest.mark.engine

HEADS = 3
BATCHES = [
    {
        "prompts": [[5, 9, 11, 2], [7, 7, 3]],
        "sampling": [{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}] * 2,
    }
]


@pytest.fixture(scope="module")
def plain(generate, tiny):
    return tokens(generate({"model": tiny[0], "skip_tokenizer_init": True}, BATCHES))


def tokens(result):
    return [r["token_ids"] for r in result["batches"][0]]


def ask(generate, tiny, speculative_config):
    arguments = {"model": tiny[0], "skip_tokenizer_init": True}
    return generate(arguments | {"speculative_config": speculative_config}, BATCHES)


def fasterdecoding(folder, base):
    """Their format; heads that repeat the base's next token."""
    lm_head = base_model.lm_head_weight(base).float()
    hidden = lm_head.shape[1]
    weights = {}
    for i in range(HEADS):
        weights[f"{i}.0.linear.weight"] = torch.zeros(hidden, hidden)
        weights[f"{i}.0.linear.bias"] = torch.zeros(hidden)
        weights[f"{i}.1.weight"] = lm_head.clone()
    folder.mkdir()
    torch.save(weights, folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_fasterdecoding_heads_are_served(generate, tiny, plain, tmp_path):
    heads = fasterdecoding(tmp_path / "theirs", Path(tiny[0]))
    config = {"method": "cerberus", "model": heads, "gate": "always"}
    found = ask(generate, tiny, config)
    assert tokens(found) == plain
    assert found["metrics"]["vllm:accel_drafted_tokens"] > 0


def test_vllm_serves_the_medusa_heads_we_write(generate, tiny, plain, tmp_path):
    lm_head = base_model.lm_head_weight(Path(tiny[0]))
    heads = CerberusHeads(
        draft_tokens=HEADS, blocks=1, hidden_size=lm_head.shape[1], cross_links=False
    )
    medusa.write_for_vllm(tmp_path / "ours", heads, lm_head)
    found = ask(
        generate,
        tiny,
        {
            "method": "medusa",
            "model": str(tmp_path / "ours"),
            "num_speculative_tokens": HEADS,
        },
    )
    assert tokens(found) == plain
    assert found["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_heads_of_a_limited_vocabulary_are_served(generate, tiny, plain, tmp_path):
    config, heads = checkpoint.load(Path(tiny[1]))
    allowed = sorted({token for answer in plain for token in answer})[:20]
    heads.limit_vocabulary(torch.tensor(allowed))
    config = dataclasses.replace(config, draft_vocab_size=len(allowed))
    state = files.load_tensors(Path(tiny[1]) / "self_test.safetensors")
    test = checkpoint.SelfTest(state["hidden_states"], state["token_ids"])
    checkpoint.save(tmp_path / "few", config, heads, test)
    settings = {"method": "cerberus", "model": str(tmp_path / "few"), "gate": "always"}
    found = ask(generate, tiny, settings)
    assert tokens(found) == plain
    assert found["metrics"]["vllm:accel_drafted_tokens"] > 0
