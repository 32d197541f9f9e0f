"""What stock V1 does to drafts that costs time or teaches the gate lies; ours does not."""

import pytest

pytestmark = pytest.mark.engine


def greedy(max_tokens, **more):
    return {"temperature": 0.0, "max_tokens": max_tokens, "detokenize": False, **more}


def cerberus(tiny, gate="always", **engine):
    model, heads = tiny
    config = {"method": "cerberus", "model": heads, "gate": gate}
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "speculative_config": config,
        **engine,
    }


def drafted(metrics):
    """Draft tokens verified, as vLLM and as we count them."""
    return (
        metrics.get("vllm:spec_decode_num_draft_tokens", 0),
        metrics.get("vllm:accel_drafted_tokens", 0),
    )


def proposed(metrics):
    """Draft tokens as they left the heads."""
    return sum(
        int(key.partition("length=")[2]) * amount
        for key, amount in metrics.items()
        if key.startswith("vllm:accel_draft_length|")
    )


def test_one_request_near_the_models_length_does_not_stop_the_others(generate, tiny):
    batch = {"prompts": [[3] * 100, [4] * 10], "sampling": [greedy(28), greedy(60)]}
    result = generate(cerberus(tiny, max_model_len=128), [batch])
    metrics = result["metrics"]
    assert [len(r["token_ids"]) for r in result["batches"][0]] == [28, 60]
    theirs, ours = drafted(metrics)
    assert theirs == ours > 0
    closed = metrics["vllm:accel_gate_decisions|reason=no_room|state=closed"]
    assert closed == 4, "no room is left in the last two steps of each request only"


def test_a_fully_cached_prompt_is_not_padded_with_drafts(generate, tiny):
    prompt = {"prompts": [[5, 6] * 32 + [7]], "sampling": [greedy(4)]}
    engine = cerberus(tiny, gate="never", block_size=32, enable_prefix_caching=True)
    metrics = generate(engine, [prompt, prompt])["metrics"]
    assert metrics["vllm:prefix_cache_hits"] == 64
    assert drafted(metrics) == (0, 0)


@pytest.fixture(scope="module")
def narrow(generate, tiny):
    """An engine of few tokens a step: drafts are cut, prompts are read in chunks.

    After a crowd, a request with a seed comes twice: the second time its prompt is cached
    and read at once.
    """
    crowd = {"prompts": [[i] * 9 for i in range(8)], "sampling": [greedy(40)] * 8}
    seeded = greedy(24, seed=1) | {"temperature": 1.0}
    drawn = {"prompts": [[3] * 5, [5, 6] * 35], "sampling": [greedy(60), seeded]}
    engine = cerberus(tiny, max_num_batched_tokens=24, max_num_seqs=8, block_size=32)
    return generate(engine, [crowd, drawn, drawn])


def test_drafts_cut_by_the_token_budget_count_as_cut(narrow):
    metrics = narrow["metrics_by_batch"][0]
    theirs, ours = drafted(metrics)
    assert theirs == ours < proposed(metrics)


def test_a_seed_draws_the_same_tokens_whether_the_prompt_is_chunked_or_not(narrow):
    _, chunked, whole = narrow["batches"]
    assert narrow["metrics"]["vllm:prefix_cache_hits"] >= 64
    assert chunked == whole


def test_drafts_cut_by_a_grammar_count_as_cut(generate, reference_model, reference_prompts):
    engine = {
        "model": reference_model,
        "speculative_config": {"method": "cerberus", "gate": "always"},
    }
    words = greedy(40, regex="[a-z]{6}( [a-z]{6}){9}") | {"detokenize": True}
    batch = {"prompts": reference_prompts[:2], "sampling": [words] * 2}
    metrics = generate(engine, [batch])["metrics"]
    theirs, ours = drafted(metrics)
    assert theirs == ours < proposed(metrics)


def test_counters_agree_with_the_outputs(generate, tiny):
    batch = {
        "prompts": [[i] * (5 + 7 * i) for i in range(1, 6)],
        "sampling": [greedy(20 + i) for i in range(5)],
    }
    result = generate(cerberus(tiny), [batch])
    metrics = result["metrics"]
    given = sum(len(r["token_ids"]) for r in result["batches"][0])
    steps = metrics["vllm:accel_request_steps"]
    assert metrics["vllm:accel_output_tokens"] == given == 110
    assert steps + metrics["vllm:accel_accepted_tokens"] == given
    lengths = {k: v for k, v in metrics.items() if "accel_draft_length" in k}
    decisions = {k: v for k, v in metrics.items() if "accel_gate_decisions" in k}
    assert sum(lengths.values()) == sum(decisions.values()) == steps
    assert (
        metrics["vllm:accel_accepted_tokens"]
        == metrics["vllm:spec_decode_num_accepted_tokens"]
        > 0
    )
