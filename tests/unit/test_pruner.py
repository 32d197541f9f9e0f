from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from lazyllm_reference import Reference
from toy_engine import ToyEngine

from vllm_accel.lazyllm.config import LazyConfig
from vllm_accel.toy import ToyDecoder

SMALL = {
    "granularity": "page",
    "prune_after": (1, 2),
    "min_prompt": 1,
    "sink": 1,
    "recent": 1,
    "revive_every": 1,
    "observe": 1,
    "spread": 0,
}


def prompt(length, seed=0):
    return torch.randint(
        64, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def make(size=4, reserve=0, num_blocks=256, **settings):
    toy = ToyDecoder(block_size=size, num_blocks=num_blocks).double()
    return ToyEngine(toy, LazyConfig(**SMALL | settings), reserve)


def refer(engine, keep, budget, **more):
    return Reference(
        engine.toy,
        points=(1, 2),
        keep=keep,
        size=engine.pruner.schedule.unit,
        fills=engine.size // engine.pruner.schedule.unit,
        sink=1,
        recent=1,
        budget=budget,
        **more,
    )


def agree(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def decode_alike(engine, reference, expected, steps):
    """Both decode the reference's greedy tokens."""
    for _ in range(steps):
        token = int(expected.argmax())
        engine.tokens["a"].append(token)
        expected = reference.decode(token)
        agree(engine.step(["a"])["a"], expected)


@pytest.mark.parametrize(
    ("size", "budget", "keep"),
    [
        (4, 1, (0.5, 0.25)),
        (4, 3, (0.3, 0.3)),
        (4, 100, (1.0, 0.4)),
        (1, 5, (0.5, 0.25)),
        (1, 100, (0.3, 0.1)),
    ],
)
def test_prefill_and_decoding_with_revival_equal_the_reference(size, budget, keep):
    engine = make(size, keep=keep, revive_pages=budget)
    reference = refer(engine, keep, budget)
    engine.add("a", prompt(39))
    expected = reference.prefill(prompt(39))
    agree(engine.step(["a"])["a"], expected)
    decode_alike(engine, reference, expected, steps=20)
    assert engine.pruner.counts.pages_revived == reference.revived > 0


def run_alike(engine, reference, most):
    """A prompt in pieces of at most so many tokens, and some decoding after it."""
    engine.add("a", prompt(39))
    expected = reference.prefill(prompt(39), most)
    for _ in range(0, 39, most):
        got = engine.step(["a"], most)["a"]
    agree(got, expected)
    decode_alike(engine, reference, expected, steps=8)


@pytest.mark.parametrize("most", [8, 10, 16])
def test_a_prompt_in_pieces_equals_the_reference(most):
    engine = make(keep=(0.5, 0.25), revive_pages=2)
    reference = refer(engine, (0.5, 0.25), budget=2)
    run_alike(engine, reference, most)


@pytest.mark.parametrize(("size", "most"), [(4, 39), (4, 10), (1, 39)])
def test_several_tokens_may_say_who_matters(size, most):
    engine = make(size, keep=(0.5, 0.25), revive_pages=2, observe=6)
    reference = refer(engine, (0.5, 0.25), budget=2, observe=6)
    run_alike(engine, reference, most)


@pytest.mark.parametrize(("size", "most"), [(4, 39), (4, 10), (1, 39)])
def test_neighbours_of_what_is_looked_at_may_matter_as_much(size, most):
    engine = make(size, keep=(0.5, 0.25), revive_pages=2, spread=3)
    reference = refer(engine, (0.5, 0.25), budget=2, spread=3)
    run_alike(engine, reference, most)


@pytest.mark.parametrize(("size", "most"), [(4, 39), (4, 10), (1, 39)])
def test_the_layer_just_run_may_say_who_matters_as_in_the_paper(size, most):
    engine = make(size, keep=(0.5, 0.25), revive_pages=2, look_ahead=False)
    reference = refer(engine, (0.5, 0.25), budget=2, ahead=False)
    run_alike(engine, reference, most)


@pytest.mark.parametrize("every", [2, 5])
def test_pages_may_be_chosen_every_few_steps(every):
    engine = make(keep=(0.5, 0.25), revive_pages=2, revive_every=every)
    reference = refer(engine, (0.5, 0.25), budget=2, every=every)
    engine.add("a", prompt(39))
    expected = reference.prefill(prompt(39))
    agree(engine.step(["a"])["a"], expected)
    decode_alike(engine, reference, expected, steps=20)
    assert engine.pruner.counts.pages_revived == reference.revived > 0


@pytest.mark.parametrize(("granularity", "budget"), [("page", 2), ("token", 0)])
def test_a_cached_dense_prefix_is_used_and_the_rest_pruned(granularity, budget):
    engine = make(keep=(0.5, 0.25), revive_pages=2, granularity=granularity)
    reference = refer(engine, (0.5, 0.25), budget)
    engine.add("dense", prompt(16), keep=1.0)
    engine.step(["dense"])
    engine.add("a", prompt(39), cached=("dense", 16))
    reference.prompt_len = 39
    reference.piece(prompt(39)[:16], dense=True)
    expected = reference.piece(prompt(39)[16:])
    agree(engine.step(["a"])["a"], expected)
    decode_alike(engine, reference, expected, steps=8)


def test_the_same_holds_in_single_precision():
    toy = ToyDecoder(num_blocks=256)
    engine = ToyEngine(toy, LazyConfig(**SMALL, keep=(0.5, 0.25), revive_pages=2))
    reference = refer(engine, (0.5, 0.25), budget=2)
    engine.add("a", prompt(39))
    expected = reference.prefill(prompt(39))
    torch.testing.assert_close(
        engine.step(["a"])["a"] / expected.abs().max(),
        expected / expected.abs().max(),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("revive", ["off", "budget"])
def test_keeping_everything_gives_plains_tokens(revive):
    plain, lazy = make(min_prompt=1000), make(keep=1.0, revive=revive)
    nearly = make(keep=(0.999, 0.999), revive=revive)
    for engine in (plain, lazy, nearly):
        engine.add("a", prompt(30))
        engine.generate(["a"], 20)
    assert plain.tokens["a"] == lazy.tokens["a"] == nearly.tokens["a"]
    assert (lazy.steps_in_spans, nearly.steps_in_spans) == (0, 1)


@pytest.mark.parametrize("most", [39, 16, 10, 3])
def test_single_tokens_moved_together_equal_the_reference(most):
    engine = make(keep=(0.5, 0.25), granularity="token")
    run_alike(engine, refer(engine, (0.5, 0.25), budget=0), most)
    assert (engine.ledger.pages_given_back > 0) == (most > 3)


@pytest.mark.parametrize(
    ("keep", "more", "same"),
    [
        ((0.5, 0.25), {"observe": 6}, {"observe": 6}),
        ((0.5, 0.25), {"spread": 3}, {"spread": 3}),
        ((0.5, 0.25), {"look_ahead": False}, {"ahead": False}),
        ((1.0, 0.4), {}, {}),
        ((0.4, 0.0001), {}, {}),
    ],
)
@pytest.mark.parametrize("most", [39, 10])
def test_single_tokens_are_chosen_as_the_reference_does(keep, more, same, most):
    engine = make(keep=keep, granularity="token", **more)
    run_alike(engine, refer(engine, keep, budget=0, **same), most)


@pytest.mark.parametrize("most", [100, 10])
def test_a_resumed_request_of_single_tokens_recomputes_what_it_had_generated(most):
    """In a piece that begins in the prompt and ends behind it, and in pieces behind it."""
    engine = make(keep=(0.5, 0.25), granularity="token")
    reference = refer(engine, (0.5, 0.25), budget=0)
    ids = prompt(39) + prompt(14, seed=1)
    engine.add("a", prompt(39))
    engine.tokens["a"] = ids
    reference.prompt_len = 39
    for first in range(0, len(ids), most):
        expected = reference.piece(ids[first : first + most])
        agree(engine.step(["a"], most)["a"], expected)
    decode_alike(engine, reference, expected, steps=8)


def test_pages_that_single_tokens_leave_go_back_to_the_pool():
    engine = make(keep=(0.5, 0.25), granularity="token")
    engine.add("a", prompt(40))
    engine.generate(["a"], 1)
    held = sum(engine.books.owners().values())
    assert held == 10 + 6 + 3 * 2
    assert held / 40 == engine.pruner.schedule.pages_ratio(40, float("inf"))


def test_a_dense_request_beside_pruned_ones_is_what_it_is_alone():
    alone, crowd = make(keep=0.2, min_prompt=20), make(keep=0.2, min_prompt=20)
    crowd.add("pruned", prompt(40, seed=1))
    for engine in (alone, crowd):
        engine.add("dense", prompt(18))
    alone.generate(["dense"], 12)
    crowd.generate(["pruned", "dense"], 12)
    assert crowd.tokens["dense"] == alone.tokens["dense"]
    assert crowd.pruner.counts.pages_revived > 0
    assert crowd.pruner.counts.prompts_inert == 1


def test_positions_are_never_renumbered_and_the_last_token_is_kept():
    engine = make(keep=(0.5, 0.2))
    engine.add("a", prompt(40))
    step = engine.pruner.begin({"a": (0, 40)})
    stream = engine._embed({"a": (0, 40)})
    for k in range(3):
        (lane,) = step.lanes(k)
        assert torch.equal(stream.positions, torch.from_numpy(lane.positions))
        assert lane.positions[-1] == 39
        assert (np.diff(lane.positions) > 0).all()
        scores = torch.rand(lane.seq_len)
        asked = step.scored(k) or step.ahead(k)[1]
        stream = step.leave(k, stream, dict.fromkeys(asked, scores))
    assert torch.equal(stream.positions, torch.from_numpy(step.origin))


def test_parked_and_kept_are_all_at_every_step():
    engine = make(keep=(0.5, 0.25), revive_pages=2)
    engine.add("a", prompt(42))
    kept = []
    for _ in range(15):
        engine.generate(["a"], 1)
        kept.append(int((engine.pruner.prompt("a").passed == 3).sum()))
        assert kept[-1] + engine.pruner.aux.num_parked("a") == 42
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]


def test_no_token_runs_a_layer_twice():
    engine = make(keep=(0.5, 0.25))
    engine.add("a", prompt(20))
    engine.step(["a"])
    with pytest.raises(AssertionError, match="not 0"):
        engine.pruner.prompt("a").run(0, np.array([3]))


def test_a_revived_page_sees_what_is_there_up_to_itself_and_nothing_later():
    engine = make(keep=(0.5, 0.25), revive_pages=100)
    engine.add("a", prompt(42))
    engine.generate(["a"], 2)
    state = engine.pruner.prompt("a")
    asked = sorted(engine.pages.asked)
    step = engine.pruner.begin({"a": (43, 44)}, asked)
    for k in (1, 2):
        for (_, _, page), lane in zip(
            [wanted for wanted in asked if wanted[1] == k], step.lanes(k)[1:], strict=True
        ):
            assert lane.positions.tolist() == list(range(4 * page, 4 * page + 4))
            assert (
                lane.pages.tolist() == np.flatnonzero(state.present[k, : page + 1]).tolist()
            )
            assert lane.seq_len == 4 * len(lane.pages)
    assert asked


def test_a_short_pool_declines_revivals_and_never_takes_the_reserve():
    rich, poor = make(keep=(0.5, 0.25)), make(keep=(0.5, 0.25), num_blocks=45, reserve=100)
    for engine in (rich, poor):
        engine.add("a", prompt(40))
        engine.generate(["a"], 6)
    assert rich.ledger.pages_granted > 0
    assert rich.ledger.pages_declined == poor.ledger.pages_granted == 0
    assert poor.ledger.pages_declined > 2 * poor.pruner.config.revive_pages


def test_no_more_is_asked_for_than_the_budget_what_is_under_way_included():
    engine = make(keep=(0.5, 0.25), revive_pages=3)
    engine.add("a", prompt(60))
    engine.generate(["a"], 1)
    step = engine.pruner.begin({"a": (60, 61)})
    for k, span in enumerate(engine.spans[:-1]):
        seen = step.lanes(k)[0].seq_len
        step.note(
            k, {"a": torch.rand(seen, generator=torch.Generator().manual_seed(span.first))}
        )
    wants = step.wants()
    assert len(wants) == 3
    more = step.wants(asked=wants[:1])
    assert len(more) == 2
    assert wants[0] not in more
    assert len(step.wants(asked=[("another", 1, 1)])) == 3


def test_decoding_requests_take_turns_at_being_scored():
    engine = make(keep=(0.5, 0.25), revive_pages=2)
    for i in range(5):
        engine.add(f"r{i}", prompt(40, seed=i))
    engine.generate([f"r{i}" for i in range(5)], 1)
    pieces = {f"r{i}": (40, 41) for i in range(5)}
    turns = [sorted(engine.pruner.begin(pieces).scored(0)) for _ in range(5)]
    assert all(len(turn) == 2 for turn in turns)
    assert Counter(chain.from_iterable(turns)) == dict.fromkeys(pieces, 2)


def test_pages_of_pruned_tokens_go_back_to_the_pool():
    engine = make(keep=(0.5, 0.25), revive="off")
    engine.add("a", prompt(40))
    engine.generate(["a"], 1)
    held = sum(engine.books.owners().values())
    schedule = engine.pruner.schedule
    assert held / 40 == schedule.pages_ratio(40, float("inf"))
    assert held == 10 + 6 + 4 * 2


def test_a_preempted_request_starts_again_as_if_it_were_new():
    fresh, broken = make(keep=(0.5, 0.25)), make(keep=(0.5, 0.25))
    for engine in (fresh, broken):
        engine.add("a", prompt(40))
    broken.generate(["a"], 1)
    broken.preempt("a", 40)
    del broken.tokens["a"][40:]
    fresh.generate(["a"], 10)
    broken.generate(["a"], 10)
    assert broken.tokens["a"] == fresh.tokens["a"]


def test_a_resumed_request_recomputes_what_it_had_generated():
    engine = make(keep=(0.5, 0.25))
    engine.add("a", prompt(40))
    engine.generate(["a"], 9)
    engine.preempt("a", 40)
    engine.generate(["a"], 5)
    state = engine.pruner.prompt("a")
    assert state.num_tokens == 40
    assert state.is_filled
    assert state.present[:, -1].all()


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("seed", range(6))
def test_random_lives_return_every_page_and_read_no_other(seed, granularity):
    rng = np.random.default_rng(seed)
    engine = make(keep=(0.5, 0.25), num_blocks=200, granularity=granularity)
    live = {}
    for turn in range(40):
        chance = rng.random()
        if len(live) < 3 and chance < 0.5:
            live[f"r{turn}"] = int(rng.integers(5, 40))
            engine.add(f"r{turn}", prompt(live[f"r{turn}"], seed=turn))
        elif live and chance < 0.6:
            gone = str(rng.choice(list(live)))
            engine.end(gone)
            del live[gone]
        elif live and chance < 0.7:
            req_id = str(rng.choice(list(live)))
            engine.preempt(req_id, live[req_id])
        batch = [req_id for req_id in live if rng.random() < 0.8]
        if batch:
            logits = engine.step(batch, most=int(rng.choice([7, 16, 100])))
            assert not any(row.isnan().any() for row in logits.values())
            for req_id in batch:
                if engine.computed[req_id] == len(engine.tokens[req_id]):
                    engine.tokens[req_id].append(int(logits[req_id].argmax()))
        assert max(engine.books.owners().values(), default=1) == 1
    for req_id in live:
        engine.end(req_id)
    assert engine.books.num_free() == 199
    assert engine.pruner.aux is None or engine.pruner.aux.num_requests() == 0
