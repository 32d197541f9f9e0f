"""Spans on vLLM's own layers and attention kernels equal the naive reference."""

import pytest
import torch

pytest.importorskip("vllm")
from lazyllm_reference import Reference
from llama_layers import LlamaLayers
from vllm_llama import VllmEngine

from vllm_accel.lazyllm.config import LazyConfig
from vllm_accel.testing import write_tiny_model

SMALL = {
    "granularity": "page",
    "prune_after": (2, 4),
    "min_prompt": 64,
    "sink": 1,
    "recent": 1,
    "revive_every": 1,
    "observe": 1,
    "spread": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return str(write_tiny_model(folder, layers=8))


def make(model, **settings):
    return VllmEngine(model, LazyConfig(**SMALL | settings))


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (length,), generator=generator).tolist()


def refer(model, keep, budget, **more):
    return Reference(
        LlamaLayers(model),
        points=(2, 4),
        keep=keep,
        size=32,
        sink=1,
        recent=1,
        budget=budget,
        **more,
    )


def agree(got, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        got.double() / scale, expected.double() / scale, rtol=0, atol=1e-3
    )


def decode_alike(engine, reference, expected, steps):
    for _ in range(steps):
        token = int(expected.argmax())
        engine.tokens["a"].append(token)
        expected = reference.decode(token)
        agree(engine.step(["a"])["a"], expected)


@pytest.mark.parametrize(("keep", "budget"), [((0.5, 0.25), 2), ((0.4, 0.4), 100)])
def test_prefill_and_decoding_with_revival_equal_the_reference(model, keep, budget):
    engine = make(model, keep=keep, revive_pages=budget)
    reference = refer(model, keep, budget)
    engine.add("a", prompt(427))
    expected = reference.prefill(prompt(427))
    agree(engine.step(["a"])["a"], expected)
    decode_alike(engine, reference, expected, steps=12)
    assert engine.pruner.counts.pages_revived == reference.revived > 0


def test_a_prompt_in_pieces_equals_the_reference(model):
    engine = make(model, keep=(0.5, 0.25), revive="off", observe=5)
    reference = refer(model, (0.5, 0.25), 0, observe=5)
    engine.add("a", prompt(300))
    expected = reference.prefill(prompt(300), 80)
    for _ in range(0, 300, 80):
        got = engine.step(["a"], 80)["a"]
    agree(got, expected)
    decode_alike(engine, reference, expected, steps=4)


def test_a_dense_request_is_the_same_to_the_bit_beside_a_pruned_one(model):
    alone, crowd = make(model, min_prompt=999), make(model, keep=0.3)
    for engine in (alone, crowd):
        engine.add("dense", prompt(60))
    crowd.add("pruned", prompt(300, seed=1))
    expected = alone.step(["dense"])["dense"]
    assert torch.equal(crowd.step(["pruned", "dense"])["dense"], expected)
    assert (alone.steps_in_spans, crowd.steps_in_spans) == (0, 1)
