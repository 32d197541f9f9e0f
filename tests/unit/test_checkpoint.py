import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_accel import CheckpointError
from vllm_accel.cerberus import checkpoint
from vllm_accel.on_disk import base_model, location
from vllm_accel.testing import write_tiny_model, write_untrained_heads


def test_heads_survive_saving(heads_folder):
    config, heads = checkpoint.load(heads_folder)
    assert (config.draft_tokens, heads.draft_tokens) == (4, 4)
    state = load_file(heads_folder / "model.safetensors")
    assert all(torch.equal(state[k], v) for k, v in heads.state_dict().items())


def test_heads_of_zeros_pass_their_self_test(tmp_path, tiny_model):
    heads = write_untrained_heads(tmp_path / "heads", tiny_model, accepted_per_step=4.0)
    assert checkpoint.check_against_base(heads, tiny_model) == 4.0


def test_a_fine_tuned_model_is_another_base(heads_folder, tiny_model, tmp_path):
    other = tmp_path / "tuned"
    shutil.copytree(tiny_model, other)
    state = load_file(other / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] += 0.01
    save_file(state, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="were trained on 'tiny'"):
        checkpoint.check_against_base(heads_folder, other)


def test_the_fingerprint_does_not_depend_on_the_float_type(tmp_path, tiny_model):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    state = load_file(copy / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in state.items()}, copy / "model.safetensors")
    assert base_model.fingerprint(copy) == base_model.fingerprint(tiny_model)


def test_a_sharded_model_has_the_fingerprint_of_the_whole(tmp_path, tiny_model):
    state = load_file(tiny_model / "model.safetensors")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert base_model.fingerprint(tmp_path) == base_model.fingerprint(tiny_model)


def test_heads_are_looked_for_beside_the_model(tiny_model):
    assert (
        location.method_folder("cerberus", None, base=str(tiny_model))
        == tiny_model / "cerberus"
    )


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def drop_tensor(state):
    del state["biases.1"]


def put_nan(state):
    state["weights.0"][0, 0, 0] = float("nan")


def to_integers(state):
    state["weights.0"] = state["weights.0"].int()


DAMAGE = {
    "no folder": (shutil.rmtree, "No heads in"),
    "no config": (lambda f: (f / "config.json").unlink(), "No heads in"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "has format 'list'",
    ),
    "foreign format": (
        lambda f: edit_config(f, format="medusa"),
        "has format 'medusa'",
    ),
    "unknown key": (lambda f: edit_config(f, colour=1), "unknown ['colour']"),
    "wrong type": (lambda f: edit_config(f, blocks="2"), "is a str, expected int"),
    "negative width": (
        lambda f: edit_config(f, hidden_size=-4),
        "hidden_size=-4 is out of range",
    ),
    "width beyond reason": (
        lambda f: edit_config(f, hidden_size=100_000),
        "do not belong together",
    ),
    "threshold not a number": (
        lambda f: edit_config(f, entropy_threshold=float("nan")),
        "entropy_threshold=nan is out of range",
    ),
    "whole-number weights": (
        lambda f: edit_weights(f, to_integers),
        "holds no usable weights",
    ),
    "no heads at all": (lambda f: edit_config(f, draft_tokens=0), "expected 1..16"),
    "fewer heads": (lambda f: edit_config(f, draft_tokens=2), "do not belong together"),
    "more blocks": (lambda f: edit_config(f, blocks=3), "do not belong together"),
    "other width": (lambda f: edit_config(f, hidden_size=32), "do not belong together"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "is missing or damaged",
    ),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "is missing or damaged",
    ),
    "lost tensor": (
        lambda f: edit_weights(f, drop_tensor),
        "'biases.1' has no such tensor",
    ),
    "NaN": (lambda f: edit_weights(f, put_nan), "holds no usable weights"),
    "no self-test": (
        lambda f: (f / "self_test.safetensors").unlink(),
        "is missing or damaged",
    ),
    "foreign self-test": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "self_test.safetensors"),
        "expected hidden_states and token_ids",
    ),
    "self-test of another vocabulary": (
        lambda f: save_file(
            {
                "hidden_states": torch.zeros(1, 64),
                "token_ids": torch.full((1, 5), 10**6, dtype=torch.int32),
            },
            f / "self_test.safetensors",
        ),
        "token_ids of the self-test go from 1000000 to 1000000",
    ),
    "heads that lost their skill": (
        lambda f: edit_config(f, accepted_per_step=15.0),
        "fail their self-test",
    ),
    "another base": (
        lambda f: edit_config(f, base_fingerprint="0" * 16),
        "were trained on 'tiny'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_heads_are_refused_with_a_sentence(heads_folder, tiny_model, damage):
    break_it, sentence = DAMAGE[damage]
    break_it(heads_folder)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.check_against_base(heads_folder, tiny_model)
    assert sentence in str(refused.value)
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_without_safetensors_is_refused(heads_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"No \*\.safetensors"):
        checkpoint.check_against_base(heads_folder, tmp_path)


def test_a_name_that_is_neither_folder_nor_repository_is_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        location.method_folder("cerberus", "/no/such/folder", base="x")


def test_another_model_of_the_same_shape_is_another_base(heads_folder, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="expected the same weights"):
        checkpoint.check_against_base(heads_folder, other)


def test_a_limited_vocabulary_survives_saving(heads_folder, tmp_path):
    config, heads = checkpoint.load(heads_folder)
    heads.limit_vocabulary(torch.tensor([3, 5, 8]))
    config = dataclasses.replace(config, draft_vocab_size=3)
    test = checkpoint.SelfTest(torch.zeros(1, 64), torch.zeros(1, 5, dtype=torch.int32))
    checkpoint.save(tmp_path / "few", config, heads, test)
    _, again = checkpoint.load(tmp_path / "few")
    assert again.draft_token_ids.tolist() == [3, 5, 8]


def test_token_ids_beyond_the_vocabulary_are_refused(heads_folder, tmp_path):
    config, heads = checkpoint.load(heads_folder)
    heads.limit_vocabulary(torch.tensor([3, 5000]))
    config = dataclasses.replace(config, draft_vocab_size=2)
    test = checkpoint.SelfTest(torch.zeros(1, 64), torch.zeros(1, 5, dtype=torch.int32))
    checkpoint.save(tmp_path / "few", config, heads, test)
    with pytest.raises(CheckpointError, match="go from 3 to 5000"):
        checkpoint.load(tmp_path / "few")
