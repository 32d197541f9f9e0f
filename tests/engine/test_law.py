"""The law: the same greedy tokens as plain vLLM, exactly, with split-KV off."""

import pytest

pytestmark = pytest.mark.engine

GATES = {
    "goodput": {},
    "always": {"gate": "always"},
    "never": {"gate": "never"},
    "entropy": {"gate": "entropy", "entropy_threshold": 1.0},
    "random": {"gate": "vllm_accel.testing:RandomGate"},
}

AHEAD = "vllm:accel_gate_decisions|reason=ahead|state=closed"

ROOMY = {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}
# Chunked prefill, prefix caching, drafts cut by the token budget, preemption.
TIGHT = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 24,
}

# Steps queued with room for whole drafts, up to the model's length.
SHORT = {**ROOMY, "max_model_len": 224}


def greedy(max_tokens, **more):
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more}


def law_batches(prompts):
    """Batch 1, 3 and 8 of mixed lengths; the 8 twice, for the prefix cache."""
    mixed = [ids[: 20 + 23 * i] for i, ids in enumerate(prompts[:8])]
    eight = {"prompts": mixed, "sampling": [greedy(40 + 9 * i) for i in range(8)]}
    return [
        {"prompts": mixed[:1], "sampling": [greedy(96)]},
        {"prompts": mixed[2:5], "sampling": [greedy(50), greedy(1), greedy(77)]},
        eight,
        eight,
    ]


def tokens(result):
    return [[r["token_ids"] for r in batch] for batch in result["batches"]]


@pytest.fixture(scope="module")
def plain(generate, reference_model, reference_prompts):
    """Plain vLLM's answers, once per dtype and engine."""
    known = {}

    def answers(dtype, name, engine, processes):
        if (dtype, name) not in known:
            arguments = {"model": reference_model, "dtype": dtype, **engine}
            batches = law_batches(reference_prompts)
            known[dtype, name] = generate(arguments, batches, processes=processes)
        return known[dtype, name]

    return answers


CASES = [
    *(("bfloat16", "roomy", ROOMY, False, gate) for gate in GATES),
    *(("bfloat16", "tight", TIGHT, True, gate) for gate in GATES),
    *(("float32", "tight", TIGHT, False, gate) for gate in ("goodput", "random")),
    ("bfloat16", "short", SHORT, True, "random"),
]


@pytest.mark.parametrize(("dtype", "name", "engine", "processes", "gate"), CASES)
def test_greedy_tokens_are_plain_vllms(
    plain,
    generate,
    reference_model,
    reference_prompts,
    dtype,
    name,
    engine,
    processes,
    gate,
):
    expected = plain(dtype, name, engine, processes)
    cerberus = {"method": "cerberus", **GATES[gate]}
    arguments = {"model": reference_model, "dtype": dtype, **engine}
    found = generate(
        arguments | {"speculative_config": cerberus},
        law_batches(reference_prompts),
        processes=processes,
    )
    assert tokens(found) == tokens(expected)
    if name == "tight":
        assert found["metrics"]["vllm:num_preemptions"] > 0
        assert found["metrics"]["vllm:prefix_cache_hits"] > 0
    drafted = found["metrics"].get("vllm:accel_drafted_tokens", 0)
    accepted = found["metrics"].get("vllm:accel_accepted_tokens", 0)
    assert (drafted == 0) if gate == "never" else (drafted > accepted > 0)
    # Room for drafts that stayed empty is none; requests that ended are not counted.
    theirs = found["metrics"].get("vllm:spec_decode_num_draft_tokens", 0)
    assert 0.9 * drafted <= theirs <= drafted
    opened, closed = (
        found["metrics"].get(f"vllm:accel_gate_decisions|reason={gate}|state={state}", 0)
        for state in ("open", "closed")
    )
    assert (opened > 0) == (gate != "never")
    if processes:
        assert (found["metrics"].get(AHEAD, 0) > 0) == (gate != "never")
    assert (closed > 0) == (gate != "always")
