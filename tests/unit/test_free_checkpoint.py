"""Exits on disk: what is saved comes back, what is broken is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_accel import CheckpointError
from vllm_accel.free import checkpoint
from vllm_accel.free.exit_head import ADAPTERS
from vllm_accel.on_disk import location
from vllm_accel.testing import write_tiny_model, write_untrained_exit


@pytest.fixture
def exit_folder(tmp_path, tiny_model):
    return write_untrained_exit(tmp_path / "exit", tiny_model, noise=0.1)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_exit_survives_saving(tmp_path, tiny_model, adapter):
    folder = write_untrained_exit(tmp_path / "e", tiny_model, adapter=adapter, noise=0.1)
    config, loaded = checkpoint.load(folder)
    assert (config.exit_layer, config.num_layers, config.adapter) == (1, 2, adapter)
    state = load_file(folder / "model.safetensors")
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert checkpoint.check_against_base(folder, tiny_model) == 1.0


def test_agreement_is_that_of_the_self_test(tmp_path, tiny_model):
    folder = write_untrained_exit(tmp_path / "e", tiny_model)
    file = folder / "self_test.safetensors"
    state = load_file(file)
    state["token_ids"][:4, 1] += 1
    save_file(state, file)
    assert checkpoint.check_against_base(folder, tiny_model) == 0.75


def test_an_exit_is_looked_for_beside_the_model(tiny_model):
    folder = location.method_folder("free", None, base=str(tiny_model))
    assert folder == tiny_model / "free"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change, file="model.safetensors"):
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)


def drop_bias(state):
    del state["down.bias"]


def put_nan(state):
    state["up.weight"][0, 0] = float("nan")


def to_integers(state):
    state["up.weight"] = state["up.weight"].int()


def lose_the_update(state):
    state["up.weight"] = torch.zeros_like(state["up.weight"])


def break_states(state):
    state["updates"][0, 0] = float("nan")


def other_words(state):
    state["token_ids"] = state["token_ids"] + 1


DAMAGE = {
    "no folder": (shutil.rmtree, "No exit in"),
    "no config": (lambda f: (f / "config.json").unlink(), "No exit in"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "format 'list'"),
    "heads": (lambda f: edit_config(f, format="vllm_accel.cerberus.1"), "has format"),
    "unknown key": (lambda f: edit_config(f, colour=1), "unknown ['colour']"),
    "wrong type": (lambda f: edit_config(f, exit_layer="1"), "is a str, expected int"),
    "exit at no layer": (lambda f: edit_config(f, exit_layer=0), "exit_layer=0 is out"),
    "exit at the end": (lambda f: edit_config(f, exit_layer=2), "expected 1..1"),
    "a model of one layer": (lambda f: edit_config(f, num_layers=1), "num_layers=1 is out"),
    "negative width": (lambda f: edit_config(f, hidden_size=-4), "hidden_size=-4 is out"),
    "unknown adapter": (lambda f: edit_config(f, adapter="big"), "adapter='big' is not"),
    "adapter of no width": (lambda f: edit_config(f, adapter_width=0), "adapter_width=0"),
    "width of no adapter": (lambda f: edit_config(f, adapter="none"), "expected 0..0"),
    "another adapter": (
        lambda f: edit_config(f, adapter="low_rank"),
        "'down.bias' has [16], expected no such tensor",
    ),
    "threshold above 1": (lambda f: edit_config(f, threshold=1.5), "threshold=1.5 is out"),
    "threshold not a number": (
        lambda f: edit_config(f, threshold=float("nan")),
        "threshold=nan is out",
    ),
    "other width": (lambda f: edit_config(f, hidden_size=32), "do not belong together"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is missing or damaged"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "is missing or damaged",
    ),
    "lost tensor": (
        lambda f: edit_tensors(f, drop_bias),
        "'down.bias' has no such tensor",
    ),
    "NaN": (lambda f: edit_tensors(f, put_nan), "holds no usable weights"),
    "whole numbers": (lambda f: edit_tensors(f, to_integers), "holds no usable weights"),
    "no self-test": (
        lambda f: (f / "self_test.safetensors").unlink(),
        "is missing or damaged",
    ),
    "foreign self-test": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "self_test.safetensors"),
        "expected exit_states and updates and normed_states and token_ids",
    ),
    "self-test of no rows": (
        lambda f: edit_tensors(
            f, lambda s: s.update({k: v[:0] for k, v in s.items()}), "self_test.safetensors"
        ),
        "a row of each per tried token",
    ),
    "an adapter that lost its skill": (
        lambda f: edit_tensors(f, lose_the_update),
        "fails its self-test: the adapter is off",
    ),
    "a self-test with NaN": (
        lambda f: edit_tensors(f, break_states, "self_test.safetensors"),
        "fails its self-test",
    ),
    "a self-test of other tokens": (
        lambda f: edit_tensors(f, other_words, "self_test.safetensors"),
        "the LM head agrees on 0%",
    ),
    "another base": (
        lambda f: edit_config(f, base_fingerprint="0" * 16),
        "was trained on 'tiny'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_exit_is_refused_with_a_sentence(exit_folder, tiny_model, damage):
    break_it, sentence = DAMAGE[damage]
    break_it(exit_folder)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.check_against_base(exit_folder, tiny_model)
    assert sentence in str(refused.value)
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_model_of_the_same_shape_is_another_base(exit_folder, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="expected the same weights"):
        checkpoint.check_against_base(exit_folder, other)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 128, 64), (2, 64, 65)])
def test_a_model_of_another_shape_is_refused_without_its_weights(exit_folder, shape):
    config = checkpoint.load_config(exit_folder)
    layers, hidden_size, vocab_size = shape
    with pytest.raises(CheckpointError, match="2 layers, hidden size 64, vocabulary 64"):
        checkpoint.check_shape(
            exit_folder,
            config,
            num_layers=layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
        )
    checkpoint.check_shape(exit_folder, config, num_layers=2, hidden_size=64, vocab_size=64)
