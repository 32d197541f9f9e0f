"""FREE's law: plain vLLM's greedy tokens and logits, to the bit, with split-KV off."""

import random
from pathlib import Path

import pytest
from free_reference import Free, TransformersLayers
from transformers import AutoModelForCausalLM

from vllm_accel.free import checkpoint
from vllm_accel.gating.beta_mixture import BetaMixture
from vllm_accel.testing import write_tiny_model, write_untrained_exit

pytestmark = pytest.mark.engine

RANDOM = "vllm_accel.testing:RandomExitGate"
TINY = {"skip_tokenizer_init": True}
ROOMY = {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}
# Chunked prefill, prefix caching, drafts cut by the token budget, preemption.
TIGHT = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 24,
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A tiny model of four layers, whose own exit and a noisy one lie beside it."""
    folder = tmp_path_factory.mktemp("cut")
    model = write_tiny_model(folder / "model", layers=4, scale=0.5)
    noisy = write_untrained_exit(folder / "noisy", model, exit_layer=2, noise=0.2)
    return str(model), str(noisy)


def greedy(max_tokens, **more):
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more}


def law_batches():
    """Batch 1, 3 and 8 of mixed lengths; the 8 twice, for the prefix cache."""
    draw = random.Random(0)
    mixed = [[draw.randrange(1, 64) for _ in range(20 + 23 * i)] for i in range(8)]
    eight = {"prompts": mixed, "sampling": [greedy(40 + 9 * i) for i in range(8)]}
    return [
        {"prompts": mixed[:1], "sampling": [greedy(96, logprobs=2)]},
        {"prompts": mixed[2:5], "sampling": [greedy(50), greedy(1), greedy(77)]},
        eight,
        eight,
    ]


def answers(result):
    """Tokens, and how far the second best is behind: equal logits or it would differ."""
    return [[(r["token_ids"], r["gaps"]) for r in batch] for batch in result["batches"]]


@pytest.fixture(scope="module")
def plain(generate, cut):
    known = {}

    def run(engine, processes):
        key = repr((engine, processes))
        if key not in known:
            arguments = {"model": cut[0], **TINY, **engine}
            known[key] = answers(generate(arguments, law_batches(), processes=processes))
        return known[key]

    return run


# Chunked prefill, and the prompts' pages found again.
CHUNKED = {**TIGHT, "num_gpu_blocks_override": None}


@pytest.mark.parametrize(
    ("engine", "rollback"), [(ROOMY, None), (ROOMY, 3.0), (CHUNKED, None)]
)
def test_final_drafts_are_those_of_the_published_algorithm(generate, cut, engine, rollback):
    prompts = [batch["prompts"][0] for batch in law_batches()[:2]]
    free = {"method": "free", "mode": "exit", "threshold": 0.3, "exit_layer": 3}
    free |= {"gate": "threshold", "rollback": rollback}
    arguments = {"model": cut[0], **FLOAT, **engine, **TINY, "speculative_config": free}
    alone = [{"prompts": [prompt], "sampling": [greedy(64)]} for prompt in prompts]
    found = generate(arguments, [*alone, *alone])
    if engine is CHUNKED:
        assert found["metrics"]["vllm:prefix_cache_hits"] > 0
    model = AutoModelForCausalLM.from_pretrained(cut[0]).float().eval()
    taken_back = 0
    given = [answer for batch in found["batches"] for answer in batch]
    for prompt, answer in zip([*prompts, *prompts], given, strict=True):
        published = Free(
            TransformersLayers(model), 3, "exit", 0.3, cap=8, rollback=rollback
        )
        said = published.generate(prompt, 64)
        taken_back += sum(said.drafted) - sum(said.kept)
        expected = said.token_ids
        assert answer["token_ids"][:-1] == expected[:-1]  # our last token is the deep one
    assert (taken_back > 0) == (rollback is not None)
    metrics = found["metrics"]
    assert (
        metrics["vllm:accel_final_tokens"] > metrics["vllm:accel_final_agreed_tokens"] > 0
    )


def test_the_threshold_is_learnt_as_published(generate, cut):
    prompts = law_batches()[2]["prompts"] * 2
    free = {"method": "free", "mode": "exit", "gate": "beta_mixture", "model": cut[1]}
    arguments = {"model": cut[0], **FLOAT, **ROOMY, **TINY, "speculative_config": free}
    alone = [{"prompts": [prompt], "sampling": [greedy(64)]} for prompt in prompts]
    found = generate(arguments, alone)
    model = AutoModelForCausalLM.from_pretrained(cut[0]).float().eval()
    config, adapter = checkpoint.load(Path(cut[1]))

    def published(threshold):
        free = Free(
            TransformersLayers(model),
            config.exit_layer,
            "exit",
            threshold,
            adapter=adapter.float(),
            cap=8,
            deep_end=True,
        )
        return [free.generate(prompt, 64) for prompt in prompts]

    expected = published(BetaMixture())
    thresholds = [answer.threshold for answer in expected]
    said = [answer.token_ids for answer in expected]
    assert [answer["token_ids"] for [answer] in found["batches"]] == said
    never_learnt = published(thresholds[0])
    assert [answer.token_ids for answer in never_learnt] != said


def test_final_drafts_agree_as_often_as_asked_in_bfloat16(generate, cut):
    free = {"method": "free", "mode": "exit", "exit_quality": 0.9, "exit_layer": 3}
    free |= {"gate": "vllm_accel.testing:OpenQuality"}
    arguments = {"model": cut[0], **BFLOAT, **ROOMY, **TINY, "speculative_config": free}
    eight = law_batches()[2]["prompts"]
    asked = {"accel_report": True}
    picky = greedy(200, extra_args={"exit_quality": 0.99})
    batches = [
        {"prompts": eight, "sampling": [greedy(200, extra_args=asked)] * 8},
        {"prompts": eight[:2], "sampling": [picky, greedy(1)]},
    ]
    found = generate(arguments, batches)
    metrics = found["metrics"]
    final = metrics["vllm:accel_final_tokens"]
    said = [answer["report"]["final_tokens"] for answer in found["batches"][0]]
    assert 0 < sum(said) <= found["metrics_by_batch"][0]["vllm:accel_final_tokens"]
    assert found["batches"][1][0]["report"] is None
    wrong = final - metrics["vllm:accel_final_agreed_tokens"]
    assert final > 100
    assert wrong / metrics["vllm:accel_output_tokens"] < 0.12


FLOAT, BFLOAT = {"dtype": "float32"}, {"dtype": "bfloat16"}
CASES = {
    "always": ({**FLOAT, **ROOMY}, False, {"gate": "always", "exit_layer": 1}),
    "random": ({**BFLOAT, **TIGHT}, True, {"gate": RANDOM, "exit_layer": 2}),
    "queued": ({**BFLOAT, **ROOMY}, True, {"gate": RANDOM, "exit_layer": 2}),
    "threshold": ({**FLOAT, **TIGHT}, False, {"threshold": 0.3, "exit_layer": 3}),
    "beta_mixture": ({**FLOAT, **TIGHT}, False, {"gate": "beta_mixture", "model": 1}),
    "never": ({**FLOAT, **TIGHT}, False, {"gate": "never", "exit_layer": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_plain_vllms(plain, generate, cut, name):
    engine, processes, free = CASES[name]
    free = {"method": "free", **free, **({"model": cut[1]} if "model" in free else {})}
    arguments = {"model": cut[0], **engine, **TINY, "speculative_config": free}
    found = generate(arguments, law_batches(), processes=processes)
    assert answers(found) == plain(engine, processes)
    metrics = found["metrics"]
    if "block_size" in engine:
        assert metrics["vllm:num_preemptions"] > 0
        assert metrics["vllm:prefix_cache_hits"] > 0
    drafted = metrics.get("vllm:accel_drafted_tokens", 0)
    accepted = metrics.get("vllm:accel_accepted_tokens", 0)
    assert (drafted == 0) if name == "never" else (drafted > accepted > 0)
    if name == "never":
        layer_rows = metrics["vllm:accel_layer_rows"]
        assert layer_rows == 4 * metrics["vllm:accel_output_tokens"]
