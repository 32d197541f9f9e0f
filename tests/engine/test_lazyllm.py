"""LazyLLM in the engine: plain where nothing is pruned, the reference where it is."""

import json
from pathlib import Path

import pytest
import torch
from lazyllm_reference import Reference
from llama_layers import LlamaLayers

from vllm_accel.testing import write_tiny_model, write_untrained_heads

pytestmark = pytest.mark.engine

PAGE = 32
ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "block_size": PAGE,
    "kv_cache_memory_bytes": 2**26,
    "max_model_len": 640,
}
POINTS = [2, 4]
LAZY = {
    "granularity": "page",
    "prune_after": POINTS,
    "min_prompt": 64,
    "sink": 1,
    "recent": 1,
    "revive_every": 1,
    "observe": 1,
    "spread": 0,
}
HALF = {**LAZY, "keep": [0.5, 0.25]}
BY_TOKENS = {"granularity": "token"}
# Chunked prefill, prefix caching and preemption.
TIGHT = {"max_num_batched_tokens": 96, "max_num_seqs": 4, "num_gpu_blocks_override": 100}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return str(write_tiny_model(folder, layers=8))


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (length,), generator=generator).tolist()


def greedy(max_tokens=24, **more):
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    return sampling | {"detokenize": False} | more


def batch(*prompts, **more):
    return {"prompts": list(prompts), "sampling": [greedy(**more) for _ in prompts]}


def tokens(result):
    return [[r["token_ids"] for r in answers] for answers in result["batches"]]


def lazily(**settings):
    return {"additional_config": {"lazyllm": settings}}


def counted(result, name, state):
    return result["metrics"].get(f"vllm:accel_{name}|state={state}", 0)


def refer(model, ids, keep, budget, steps, most=None, size=PAGE):
    """Greedy tokens of the naive reference, and pages it brought back."""
    torch.set_default_dtype(torch.float64)
    try:
        reference = Reference(
            LlamaLayers(model),
            points=POINTS,
            keep=keep,
            size=size,
            fills=PAGE // size,
            sink=1,
            recent=1,
            budget=budget,
        )
        logits, said = reference.prefill(ids, most), []
        for _ in range(steps):
            said.append(int(logits.argmax()))
            logits = reference.decode(said[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    return said, reference.revived


MIXED = [prompt(300 - 41 * i, seed=i) for i in range(6)]


@pytest.mark.parametrize("engine", [{}, TIGHT], ids=["roomy", "tight"])
def test_where_nothing_is_pruned_tokens_are_plains(generate, model, engine):
    """Nothing to prune by the settings, by the request, by its length."""
    asked = [batch(*MIXED), batch(*MIXED, extra_args={"lazyllm": False}), batch(*MIXED)]
    arguments = {"model": model, **ENGINE, **engine}
    plain = tokens(generate(arguments, asked))
    assert tokens(generate(arguments | lazily(**LAZY, keep=1.0), asked)) == plain
    settings = {**HALF, "min_prompt": 301}
    assert tokens(generate(arguments | lazily(**settings), asked)) == plain
    mixed = generate(arguments | lazily(**HALF), asked[1:2])
    assert tokens(mixed) == plain[1:2]
    assert counted(mixed, "prompts", "inert") >= len(MIXED)


@pytest.mark.parametrize("budget", [0, 2])
def test_tokens_are_the_references(generate, model, budget):
    """Prefill, then decoding, with and without pages brought back from the Aux Cache."""
    settings = {**HALF, "revive": "off"} if budget == 0 else {**HALF, "revive_pages": 2}
    ids = prompt(427)
    expected, revived = refer(model, ids, [0.5, 0.25], budget, steps=24)
    found = generate({"model": model, **ENGINE, **lazily(**settings)}, [batch(ids)])
    assert tokens(found) == [[expected]]
    # The reference runs the step after the last token too.
    assert counted(found, "prompt_pages", "revived") == pytest.approx(revived, abs=2)
    assert (revived > 0) == (budget > 0)
    assert counted(found, "prompt_pages", "parked") > 0
    assert counted(found, "prompt_pages", "given_back") > 0
    assert counted(found, "prompt_pages", "declined") == 0


def test_a_prompt_in_pieces_is_the_references(generate, model):
    ids = prompt(427)
    expected, _ = refer(model, ids, [0.5, 0.25], 2, steps=24, most=128)
    engine = ENGINE | {"max_num_batched_tokens": 128, "max_num_seqs": 4}
    settings = {**HALF, "revive_pages": 2}
    found = generate({"model": model, **engine, **lazily(**settings)}, [batch(ids)])
    assert tokens(found) == [[expected]]


@pytest.mark.parametrize("most", [640, 150])
def test_single_tokens_moved_together_are_the_references(generate, model, most):
    """In one piece, and in pieces that end within a page."""
    ids = prompt(427)
    expected, _ = refer(model, ids, [0.5, 0.25], 0, steps=40, most=most, size=1)
    engine = ENGINE | {"max_num_batched_tokens": most, "max_num_seqs": 4}
    arguments = {"model": model, **engine, **lazily(**HALF | BY_TOKENS)}
    found = generate(arguments, [batch(ids, max_tokens=40)])
    assert tokens(found) == [[expected]]
    assert counted(found, "prompt_pages", "given_back") > 0


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_dense_requests_are_plains_in_any_company(generate, model, granularity):
    """Beside pruned ones, before and after them, sharing their prefix."""
    shared = prompt(200)
    alone = [batch(prompt(50, seed=9)), batch(shared, extra_args={"lazyllm": 1.0})]
    plain = tokens(generate({"model": model, **ENGINE}, alone))
    pruned = batch(shared, prompt(300, seed=3))
    crowd = {
        "prompts": [shared, prompt(50, seed=9), shared, prompt(333, seed=4)],
        "sampling": [greedy(), greedy(), greedy(extra_args={"lazyllm": 1.0}), greedy()],
    }
    asked = [pruned, alone[1], pruned, crowd, alone[1], alone[0]]
    arguments = {"model": model, **ENGINE, **lazily(**HALF | {"granularity": granularity})}
    found = generate(arguments, asked)
    said = tokens(found)
    assert said[1] == said[4] == plain[1]
    assert said[5] == plain[0]
    assert said[3][1:3] == [plain[0][0], plain[1][0]]
    assert said[0][0] != plain[1][0]
    assert found["metrics"]["vllm:prefix_cache_hits"] > 0


def test_a_response_says_whether_its_prompt_was_pruned_if_asked(generate, model):
    asked = {"accel_report": True}
    answers = {
        "prompts": [prompt(300), prompt(50), prompt(300), prompt(300)],
        "sampling": [
            greedy(4, extra_args=asked),
            greedy(4, extra_args=asked),
            greedy(4, extra_args={**asked, "lazyllm": False}),
            greedy(4),
        ],
    }
    found = generate({"model": model, **ENGINE, **lazily(**HALF)}, [answers])
    reports = [answer["report"] for answer in found["batches"][0]]
    dense = {"pruned": False}
    assert reports == [{"pruned": True}, dense, dense, None]


@pytest.mark.parametrize("more", [{"revive_pages": 4}, BY_TOKENS])
def test_pressed_for_pages_it_declines_preempts_and_ends(generate, model, more):
    """Everybody is answered; those who asked for all of their prompt as by plain."""
    asked = {
        "prompts": MIXED,
        "sampling": [greedy(60, extra_args={"lazyllm": 1.0 - i % 2}) for i in range(6)],
    }
    arguments = {"model": model, **ENGINE, **TIGHT}
    plain = tokens(generate(arguments, [asked]))[0]
    found = generate(
        arguments | lazily(**HALF | more), [batch(*MIXED, max_tokens=60), asked]
    )
    assert [len(said) for said in tokens(found)[0]] == [60] * 6
    assert tokens(found)[1] == plain
    assert found["metrics"]["vllm:num_preemptions"] > 0


@pytest.fixture(scope="module")
def drafts(model, tmp_path_factory):
    """Cerberus with heads that repeat the next token."""
    heads = write_untrained_heads(tmp_path_factory.mktemp("heads"), Path(model))
    return {"speculative_config": {"method": "cerberus", "model": str(heads)}}


def with_gate(drafts, gate):
    return {"speculative_config": drafts["speculative_config"] | {"gate": gate}}


@pytest.mark.parametrize("more", [{"revive": "off"}, BY_TOKENS])
@pytest.mark.parametrize("gate", ["always", "vllm_accel.testing:CoinGate"])
def test_drafts_change_no_token_where_nothing_comes_back(
    generate, model, drafts, gate, more
):
    asked = [batch(*MIXED, max_tokens=60), batch(prompt(427), max_tokens=90)]
    arguments = {"model": model, **ENGINE, **lazily(**HALF | more)}
    alone = generate(arguments, asked)
    both = generate(arguments | with_gate(drafts, gate), asked)
    assert tokens(both) == tokens(alone)
    metrics = both["metrics"]
    assert metrics["vllm:accel_drafted_tokens"] > metrics["vllm:accel_accepted_tokens"] > 0
    for state in ("parked", "given_back"):
        parked = [counted(result, "prompt_pages", state) for result in (both, alone)]
        assert parked[0] == parked[1] > 0


@pytest.mark.parametrize("processes", [False, True])
def test_drafts_beside_revivals_leave_dense_requests_plains(
    generate, model, drafts, processes
):
    asked = {
        "prompts": MIXED,
        "sampling": [greedy(60, extra_args={"lazyllm": 1.0 - i % 2}) for i in range(6)],
    }
    arguments = {"model": model, **ENGINE, **TIGHT}
    plain = tokens(generate(arguments, [asked]))[0]
    pruning = arguments | lazily(**HALF, revive_pages=4) | with_gate(drafts, "always")
    found = generate(pruning, [batch(*MIXED, max_tokens=60), asked], processes=processes)
    assert [len(said) for said in tokens(found)[0]] == [60] * 6
    assert tokens(found)[1] == plain
    assert found["metrics"]["vllm:num_preemptions"] > 0
    assert found["metrics"]["vllm:accel_accepted_tokens"] > 0
    assert counted(found, "prompt_pages", "revived") > 0


POOL = """
import json, random, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input
    model, engine = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model, **engine, enforce_eager=True)
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    free, rng = pool.get_num_free_blocks(), random.Random(0)
    for turn in range(120):
        if rng.random() < 0.3:
            ids = [rng.randrange(1, 64) for _ in range(rng.randrange(5, 500))]
            params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 40),
                                    ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(f"r{turn}", tokens_input(ids), params)
        if rng.random() < 0.05:
            llm.llm_engine.abort_request([f"r{rng.randrange(turn + 1)}"])
        llm.llm_engine.step()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    core.step_fn()
    runner = core.model_executor.driver_worker.worker.model_runner
    print("RESULT", json.dumps({
        "free": [free, pool.get_num_free_blocks()],
        "aux": runner._pruner.aux.num_requests() if runner._pruner.aux else 0,
        "granted": core.scheduler._ledger.pages_granted,
        "given_back": core.scheduler._ledger.pages_given_back,
    }))
"""


@pytest.mark.parametrize(
    ("more", "drafting"),
    [({"revive_pages": 4}, False), ({"revive_pages": 4}, True), (BY_TOKENS, False)],
)
def test_random_lives_return_every_page(printed, model, drafts, more, drafting):
    engine = ENGINE | TIGHT | {"disable_log_stats": False}
    engine |= lazily(**HALF | more)
    engine |= with_gate(drafts, "vllm_accel.testing:RandomGate") if drafting else {}
    left = printed(["-c", POOL, model, json.dumps(engine)])
    assert left["free"][0] == left["free"][1]
    assert (left["granted"] > 0) == (more != BY_TOKENS)
    assert left["given_back"] > 0
