"""A request ends where plain vLLM ends it, also in the middle of an accepted draft."""

import re
from itertools import pairwise

import pytest

pytestmark = pytest.mark.engine

ENDINGS = {
    "max_tokens": {"max_tokens": 7, "ignore_eos": True},
    "stop string": {"max_tokens": 96, "stop": ["self.", "):", "\n\n"]},
    "stop token": {"max_tokens": 96, "stop_token_ids": list(range(10, 60))},
    "stop token after a minimum": {
        "max_tokens": 96,
        "min_tokens": 12,
        "stop_token_ids": list(range(10, 200)),
    },
}


AHEAD = "vllm:accel_gate_decisions|reason=ahead|state=closed"

LOSSY = {
    "method": "free",
    "mode": "exit",
    "exit_layer": 8,
    "num_speculative_tokens": 4,  # with more, all end before the last one comes
    "gate": "vllm_accel.testing:OpenQuality",
    "exit_quality": 0.5,
}
METHODS = {
    "cerberus": {"method": "cerberus", "gate": "vllm_accel.testing:StretchGate"},
    "free": {
        "method": "free",
        "exit_layer": 8,
        "gate": "vllm_accel.testing:RandomExitGate",
    },
}


def batches(prompts):
    """One for each ending; in the last, one request is aborted and one comes late."""
    endings = [
        {
            "prompts": [ids[:120] for ids in prompts[:24]],
            "sampling": [{"temperature": 0.0, **ending}] * 24,
        }
        for ending in ENDINGS.values()
    ]
    long = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True}
    words = {"temperature": 0.0, "max_tokens": 40, "regex": "[a-z]{6}( [a-z]{6}){9}"}
    interrupted = {
        "prompts": [ids[:60] for ids in prompts[:6]],
        "sampling": [long] * 5 + [words],
        "abort_at": 12,
        "late": 30,
    }
    return [*endings, interrupted]


@pytest.fixture(scope="module")
def answers(generate, reference_model, reference_prompts):
    """By method, "plain" among them; in float32, as in bfloat16 some CPUs round by rows."""
    asked = batches(reference_prompts)
    common = {"model": reference_model, "dtype": "float32"}
    extras = {"plain": {}}
    configs = METHODS | {"free-exit": LOSSY}
    extras |= {name: {"speculative_config": config} for name, config in configs.items()}
    return {
        name: generate({**common, **extra}, asked, processes=True)
        for name, extra in extras.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_requests_end_as_in_plain_vllm(answers, ending, method):
    place = list(ENDINGS).index(ending)
    plain, ours = (answers[name]["batches"][place] for name in ("plain", method))
    assert ours == plain
    lengths = {len(r["token_ids"]) for r in plain}
    assert max(lengths) <= ENDINGS[ending]["max_tokens"]
    assert min(lengths) >= ENDINGS[ending].get("min_tokens", 1)


@pytest.mark.parametrize("method", METHODS)
def test_some_of_them_end_inside_an_accepted_draft(answers, method):
    metrics = answers[method]["metrics_by_batch"][len(ENDINGS) - 1]
    verified = metrics["vllm:accel_request_steps"] + metrics["vllm:accel_accepted_tokens"]
    assert verified > metrics["vllm:accel_output_tokens"]


def test_steps_are_queued_ahead_and_every_batch_but_the_shortest_drafts(answers):
    by_batch = answers["cerberus"]["metrics_by_batch"]
    assert by_batch[-1][AHEAD] > 0  # wishes of steps that had no room for drafts
    drafted = [b.get("vllm:accel_drafted_tokens", 0) for b in by_batch]
    assert all(before < after for before, after in pairwise(drafted))


@pytest.mark.parametrize("method", METHODS)
def test_an_abort_and_a_grammar_while_steps_are_queued_leave_others_alone(answers, method):
    plain, ours = (answers[name]["batches"][-1] for name in ("plain", method))
    assert ours[1:] == plain[1:]
    assert re.fullmatch("[a-z]{6}( [a-z]{6})+.*", ours[-1]["text"])
    aborted, whole = ours[0]["token_ids"], plain[0]["token_ids"]
    assert 12 == len(whole) <= len(aborted) < 160
    assert aborted[:12] == whole


def test_final_drafts_end_where_they_should(answers):
    """Nothing to compare them with: they are not plain vLLM's."""
    found = answers["free-exit"]
    by_ending = dict(zip(ENDINGS, found["batches"], strict=False))
    assert {len(r["token_ids"]) for r in by_ending["max_tokens"]} == {7}
    for name in ("stop token", "stop token after a minimum"):
        ending = ENDINGS[name]
        for r in by_ending[name]:
            own = r["token_ids"][ending.get("min_tokens", 0) :]
            stops = [i for i, token in enumerate(own) if token in ending["stop_token_ids"]]
            assert stops in ([], [len(own) - 1])
    for r in by_ending["stop string"]:
        assert not any(stop in r["text"] for stop in ENDINGS["stop string"]["stop"])
    *_, words = found["batches"][-1]
    assert re.fullmatch("[a-z]{6}( [a-z]{6})+.*", words["text"])
    final = [batch["vllm:accel_final_tokens"] for batch in found["metrics_by_batch"]]
    assert 0 < final[0] < final[1] < final[-1]
