import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from vllm_accel import CheckpointError
from vllm_accel.cerberus import checkpoint, medusa
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.on_disk import base_model

HEADS, HIDDEN = 3, 64


def write_theirs(folder, layers=2, vocab=64, prefix=""):
    """A checkpoint as FasterDecoding's training writes it."""
    torch.manual_seed(0)
    weights = {}
    for i in range(HEADS):
        for j in range(layers):
            weights[f"{prefix}{i}.{j}.linear.weight"] = 0.1 * torch.randn(HIDDEN, HIDDEN)
            weights[f"{prefix}{i}.{j}.linear.bias"] = torch.randn(HIDDEN)
        weights[f"{prefix}{i}.{layers}.weight"] = torch.randn(vocab, HIDDEN)
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def their_logits(weights, hidden, layers=2):
    said = []
    for i in range(HEADS):
        x = hidden
        for j in range(layers):
            w, b = (weights[f"{i}.{j}.linear.{n}"] for n in ("weight", "bias"))
            x = x + functional.silu(functional.linear(x, w, b))
        said.append(x @ weights[f"{i}.{layers}.weight"].T)
    return torch.stack(said)


def test_fasterdecoding_heads_say_what_they_said(tmp_path):
    weights = write_theirs(tmp_path)
    config, heads = checkpoint.load(tmp_path)
    hidden = torch.randn(5, HIDDEN)
    ours = heads.logits(heads(hidden), lm_head=None)
    torch.testing.assert_close(ours, their_logits(weights, hidden))
    assert (config.draft_tokens, config.blocks, config.vocab_size) == (HEADS, 2, 64)


def test_a_prefix_of_older_files_is_known(tmp_path):
    write_theirs(tmp_path, prefix="medusa_head.")
    assert checkpoint.load_config(tmp_path).hidden_size == HIDDEN


def test_they_are_not_checked_against_a_base_they_do_not_name(tmp_path, tiny_model):
    write_theirs(tmp_path)
    assert checkpoint.check_against_base(tmp_path, tiny_model) == 0.0


def spoil_weights(folder):
    (folder / "medusa_lm_head.pt").write_bytes(b"no weights")


def spoil_count(folder):
    config = {"medusa_num_heads": 9, "medusa_num_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))


def remove_weights(folder):
    (folder / "medusa_lm_head.pt").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_weights, "is damaged"),
        (spoil_count, "does not hold 9 Medusa heads"),
        (remove_weights, "No Medusa weights"),
    ],
)
def test_damaged_heads_are_refused(tmp_path, spoil, sentence):
    write_theirs(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("own", [False, True])
def test_what_is_written_for_vllm_has_its_names(tmp_path, tiny_model, own):
    lm_head = base_model.lm_head_weight(tiny_model)
    vocab_size, hidden_size = lm_head.shape
    heads = CerberusHeads(
        draft_tokens=2,
        blocks=1,
        hidden_size=hidden_size,
        cross_links=False,
        vocab_size=vocab_size,
        own_lm_heads=own,
    )
    medusa.write_for_vllm(tmp_path, heads, lm_head)
    names = set(load_file(tmp_path / "model.safetensors"))
    blocks = {f"blocks.{i}.layers.0.{n}" for i in (0, 1) for n in ("weight", "bias")}
    own_names = {"lm_heads.0.weight", "lm_heads.1.weight"}
    assert names == blocks | (own_names if own else {"lm_head.weight"})
