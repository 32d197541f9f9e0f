"""Two ranks: the first one's word counts, so a gate that tosses coins does not hang."""

from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

WEIGHTS = Path(__file__).parents[2] / "examples" / "reference_model" / "weights"
ENGINE = {
    "model": str(WEIGHTS),
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**27,
}
REQUESTS = 24
# vLLM binds ranks to NUMA nodes of their own, and refuses two ranks on one node.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
FLOAT = {"dtype": "float32"}
"""Two ranks add in another order than one; in bfloat16 that is no matter of ties."""
GAP = 1e-4
"""Between the log-probabilities of plain vLLM's two best tokens: below it is a tie."""
MAX_TIED_SHARE = 0.2
"""Of requests: a greedy text goes its own way from its first tie on."""


@pytest.fixture(scope="module")
def ask(run_engine, prompts, tokenizer):
    """ask(ranks, **engine arguments) -> the result of one engine, of the same requests."""
    texts = [f"{a}{b}" for a, b in pairwise(prompts[: REQUESTS + 1])]
    ids = [tokenizer(text).input_ids[:180] for text in texts]

    def run(ranks, *, logprobs=None, **more):
        greedy = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
        sampling = greedy | ({"logprobs": logprobs} if logprobs else {})
        engine = ENGINE | {"tensor_parallel_size": ranks} | more
        batch = {"prompts": ids, "sampling": [sampling] * len(ids)}
        return run_engine(engine, batch, **ONE_THREAD)

    return run


@pytest.fixture(scope="module")
def plain_ranks(ask):
    return requests(ask(2))


def requests(result):
    return result["batches"][0]


def tokens(result):
    return [request["token_ids"] for request in requests(result)]


@pytest.mark.parametrize("gate", ["vllm_accel.testing:CoinGate", "goodput"])
def test_two_ranks_draft_as_one_and_say_what_plain_ranks_say(ask, plain_ranks, gate):
    found = ask(2, speculative_config={"method": "cerberus", "gate": gate})
    assert tokens(found) == [request["token_ids"] for request in plain_ranks]
    assert found["metrics"]["vllm:accel_accepted_tokens"] > 0


def test_two_ranks_say_what_one_says_but_for_ties(ask):
    one, two = ask(1, logprobs=2, **FLOAT), ask(2, **FLOAT)
    check_ties(requests(two), requests(one))


def check_ties(found, expected):
    pairs = list(zip(found, expected, strict=True))
    gaps = [b["gaps"][at] for a, b in pairs if (at := first_difference(a, b)) is not None]
    assert all(gap < GAP for gap in gaps)
    assert len(gaps) <= MAX_TIED_SHARE * len(pairs)


@pytest.mark.parametrize(
    "unit",
    [{"granularity": "page", "revive_pages": 1000}, {"granularity": "token"}],
    ids=["page", "token"],
)
def test_two_ranks_prune_as_one_does_but_for_ties(ask, unit):
    lazy = unit | {"prune_after": [4, 8], "keep": [0.5, 0.25], "min_prompt": 64}
    # What is kept must not depend on when requests meet: no prompt waits, is cut or is
    # preempted, and nobody is left out of what a step may bring back.
    lazy |= {"sink": 1, "recent": 1}
    engine = {**FLOAT, "block_size": 32, "kv_cache_memory_bytes": 2**29}
    engine |= {"max_num_batched_tokens": 8192}
    engine |= {"additional_config": {"lazyllm": lazy}}
    one, two = ask(1, logprobs=2, **engine), ask(2, **engine)
    check_ties(requests(two), requests(one))
    pruned = "vllm:accel_prompts|state=pruned"
    assert two["metrics"][pruned] == one["metrics"][pruned] == REQUESTS


def first_difference(ours, plain):
    both = zip(ours["token_ids"], plain["token_ids"], strict=True)
    return next((i for i, (a, b) in enumerate(both) if a != b), None)
