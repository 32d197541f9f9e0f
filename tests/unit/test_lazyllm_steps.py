"""LazyLLM between vLLM's scheduler and its model runner, without an engine."""

import random

import pytest
import torch

pytest.importorskip("vllm")
from lazyllm_reference import Reference
from llama_layers import LlamaLayers
from vllm_steps import Steps

from vllm_accel.testing import write_tiny_model

LAZY = {
    "granularity": "page",
    "prune_after": [2, 4],
    "min_prompt": 64,
    "sink": 1,
    "recent": 1,
    "revive_every": 1,
    "observe": 1,
    "spread": 0,
}
HALF = {**LAZY, "keep": [0.5, 0.25], "revive_pages": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return str(write_tiny_model(folder, layers=8))


@pytest.fixture(scope="module")
def steps(model):
    return Steps(model, HALF)


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def refer(model):
    """Greedy tokens of the naive reference, and pages it brought back."""

    def tokens(ids, keep, budget, count=16, most=None):
        reference = Reference(
            LlamaLayers(model),
            points=(2, 4),
            keep=keep,
            size=32,
            sink=1,
            recent=1,
            budget=budget,
        )
        logits, said = reference.prefill(ids, most), []
        for _ in range(count):
            said.append(int(logits.argmax()))
            logits = reference.decode(said[-1])
        return said, reference.revived

    return tokens


EVERYTHING = {"extra_args": {"lazyllm": False}}


def test_tokens_are_the_references_with_pages_brought_back(steps, refer):
    ids = prompt(427)
    expected, revived = refer(ids, (0.5, 0.25), budget=2)
    granted = steps.scheduler._ledger.pages_granted
    assert steps.ask(ids) == [expected]
    assert abs(steps.scheduler._ledger.pages_granted - granted - revived) <= 2
    assert revived > 4
    assert steps.pool.get_num_free_blocks() == steps.all_free


def test_a_request_can_ask_to_be_left_alone(steps, refer):
    ids = prompt(200, seed=2)
    expected, _ = refer(ids, (1.0, 1.0), budget=0)
    assert steps.ask(ids, **EVERYTHING) == [expected]
    assert steps.ask(ids, extra_args={"lazyllm": 1.0}) == [expected]


def test_dense_and_pruned_requests_share_a_prefix_in_any_order(steps, refer):
    ids = prompt(230, seed=3)
    dense, _ = refer(ids, (1.0, 1.0), budget=0)
    pruned, _ = refer(ids, (0.5, 0.25), budget=2)
    assert steps.ask(ids) == [pruned]
    assert steps.ask(ids, **EVERYTHING) == [dense]
    assert steps.ask(ids, **EVERYTHING) == [dense]
    steps.ask(ids)  # prunes what is left behind the cached prefix
    assert steps.ask(ids, **EVERYTHING) == [dense]


def test_requests_in_a_batch_are_what_they_are_alone(steps, refer):
    long, short = [prompt(300 - 50 * i, seed=20 + i) for i in range(3)], prompt(40, seed=8)
    alone = [refer(ids, (0.5, 0.25), budget=0)[0][:1] for ids in long]
    dense, _ = refer(short, (1.0, 1.0), budget=0)
    said = steps.ask(*long, short)
    assert [tokens[:1] for tokens in said[:3]] == alone
    assert said[3] == dense


def test_a_prompt_in_pieces_is_the_references(model, refer):
    steps = Steps(model, HALF, max_num_batched_tokens=128, max_num_seqs=4)
    expected, _ = refer(prompt(427), (0.5, 0.25), budget=2, most=128)
    assert steps.ask(prompt(427)) == [expected]


def test_random_lives_return_every_page(model):
    tight = {"max_num_batched_tokens": 96, "max_num_seqs": 4, "num_blocks": 110}
    steps = Steps(model, {**HALF, "revive_pages": 4}, **tight)
    rng = random.Random(0)
    preemptions = 0
    for turn in range(150):
        if rng.random() < 0.3:
            ids = prompt(rng.randrange(5, 500), seed=turn)
            steps.add(ids, max_tokens=rng.randrange(1, 60))
        if steps.asked and rng.random() < 0.05:
            steps.abort(f"r{rng.randrange(steps.asked)}")
        steps.step()
        live = steps.scheduler.requests.values()
        preemptions = max([preemptions, *(r.num_preemptions for r in live)])
    steps.run()
    ledger = steps.scheduler._ledger
    assert steps.pool.get_num_free_blocks() == steps.all_free
    assert steps.runner._pruner.aux.num_requests() == 0
    assert min(ledger.pages_granted, ledger.pages_given_back, preemptions) > 0
    assert steps.scheduler.kv_cache_manager.reset_prefix_cache()
