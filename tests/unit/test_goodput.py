import json

import numpy as np
import pytest
import torch

from vllm_accel import ConfigError
from vllm_accel.gating.cost import StepCost, StepShape
from vllm_accel.gating.goodput import (
    FIRST_STEPS,
    HABIT_EVERY,
    HABIT_SHARE,
    REFRESH_EVERY,
    Goodput,
    Load,
    best_drafts,
)
from vllm_accel.gating.signals import DraftSignals, Signals

DRAFT_TOKENS = 4


def seconds(shape):
    """Nearly free rows for one request, dear ones at load."""
    busy = 1.2e-4 * max(shape.decode_rows - 8, 0)
    prompts = 1e-4 * shape.prefill_tokens
    rows = 2e-5 * shape.decode_rows + busy + prompts
    return 5e-3 + rows + (5e-4 if shape.drafted_for else 0)


class Engine:
    """Steps of requests whose drafts survive with a given probability."""

    def __init__(self, survive, gate=None):
        self.gate = gate or Goodput(DRAFT_TOKENS)
        self.survive = survive
        self.rng = np.random.default_rng(0)
        self.drafts = {}
        self.tokens = self.time = 0.0

    def step(self, num_reqs, prefill=0):
        """Share of the requests the heads ran for."""
        ids = [str(i) for i in range(num_reqs)]
        verified = sum(self.drafts.get(i, 0) for i in ids)
        for req_id in ids:
            length = self.drafts.pop(req_id, 0)
            if length:
                chances = self.rng.random(length) < self.survive
                self.gate.learn(req_id, length, int(chances.cumprod().sum()))
                self.tokens += int(chances.cumprod().sum())
        self.tokens += num_reqs
        admitted = self.gate.admit(Signals(torch.zeros(num_reqs, 8), range(num_reqs), ids))
        opened = [i for i, yes in zip(ids, admitted, strict=True) if yes]
        if opened:
            sure = torch.full((DRAFT_TOKENS, len(opened)), 1 / 8)
            lengths = self.gate.lengths(DraftSignals(sure))
            self.drafts.update(zip(opened, lengths, strict=True))
        shape = StepShape(num_reqs + verified, num_reqs, prefill, len(opened))
        taken = seconds(shape) * self.rng.lognormal(0, 0.03)
        self.time += taken
        self.gate.observe(shape, taken)
        return len(opened) / num_reqs

    def run(self, num_reqs, steps):
        return float(np.mean([self.step(num_reqs) for _ in range(steps)]))


def test_drafts_that_survive_are_made_at_one_request_and_not_at_load():
    engine = Engine(survive=0.5)
    engine.run(1, 50)
    assert engine.run(1, 200) >= 0.8
    engine.run(32, 50)
    assert engine.run(32, 200) <= 0.1
    engine.run(1, 50)
    assert engine.run(1, 200) >= 0.8


def test_prompts_read_a_moment_ago_open_no_gate_that_load_closes():
    engine = Engine(survive=0.5)
    engine.run(32, 100)
    opened = []
    for _ in range(10):
        engine.step(32, prefill=4000)
        opened.append(engine.run(32, 40))
    assert np.mean(opened) <= 0.1


def test_drafts_that_never_survive_close_the_gate_and_some_keep_trying():
    engine = Engine(survive=0.02)
    engine.run(1, 100)
    opened = engine.run(1, 1000)
    assert 0 < opened <= 0.05


def test_a_closed_gate_opens_again_when_drafts_begin_to_survive():
    engine = Engine(survive=0.02)
    engine.run(1, 300)
    engine.survive = 0.9
    engine.run(1, 2000)
    assert engine.run(1, 200) >= 0.8


@pytest.mark.parametrize("survive", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("num_reqs", [1, 8, 32])
def test_the_rate_is_that_of_the_better_of_always_and_never(survive, num_reqs):
    engine = Engine(survive)
    engine.run(num_reqs, 100)
    engine.tokens = engine.time = 0.0
    engine.run(num_reqs, 600)
    expected = sum(survive**k for k in range(1, DRAFT_TOKENS + 1))
    always = num_reqs * (1 + expected)
    always /= seconds(StepShape(num_reqs * 5, num_reqs, 0, num_reqs))
    never = num_reqs / seconds(StepShape(num_reqs, num_reqs))
    assert engine.tokens / engine.time >= 0.97 * max(always, never)


def test_a_warm_start_decides_at_once_as_it_did():
    old = Engine(survive=0.5)
    old.run(1, 300)
    old.run(32, 300)
    gate = Goodput(DRAFT_TOKENS)
    gate.load_state_dict(json.loads(json.dumps(old.gate.state_dict())))
    assert gate.cost.seconds(StepShape(5, 1, 0, 1)) == pytest.approx(
        old.gate.cost.seconds(StepShape(5, 1, 0, 1))
    )
    assert Engine(0.5, gate).run(32, 60) <= 0.15


@pytest.mark.parametrize("state", [{}, {"cost": {}}, [], {"cost": 1}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ConfigError):
        Goodput(DRAFT_TOKENS).load_state_dict(state)


def test_two_gates_told_the_same_decide_the_same():
    a, b = Engine(0.5), Engine(0.5)
    for num_reqs in (1, 8, 32, 2):
        for _ in range(60):
            assert a.step(num_reqs) == b.step(num_reqs)


def known_cost(per_row):
    cost = StepCost()
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows, heads = int(rng.integers(4, 40)), int(rng.integers(0, 2))
        cost.observe(StepShape(rows, 4, 0, 4 * heads), 5e-3 + per_row * rows + 1e-4 * heads)
    return cost


def test_free_rows_take_every_draft_and_dear_ones_none():
    survival = np.array([[0.9, 0.5], [0.2, 0.1], [0.6, 0.1], [0.05, 0.01]])
    assert best_drafts(survival, StepShape(4, 4), known_cost(1e-9)).lengths == [2, 2, 2, 2]
    assert best_drafts(survival, StepShape(4, 4), known_cost(1.0)).lengths == [0, 0, 0, 0]


def test_what_is_verified_is_the_beginning_of_each_draft_likeliest_first():
    survival = np.array([[0.9, 0.5], [0.2, 0.1], [0.6, 0.1], [0.05, 0.01]])
    best = best_drafts(survival, StepShape(4, 4), known_cost(6e-4))
    assert best.lengths == [2, 0, 1, 0]
    assert best.gain > 1


def test_drafts_made_by_habit_teach_no_calibrator():
    engine = Engine(survive=0.95)
    engine.run(1, 200)
    weighed = 0
    for _ in range(40):
        engine.step(1)
        weighed += "0" in engine.gate._waiting
    assert 0 < weighed <= 40 // HABIT_EVERY + FIRST_STEPS


def test_a_habit_ends_where_nothing_is_wanted_any_more():
    load = Load(share=1.0)
    for _ in range(2):
        load.note_share(0.0)
    assert load.share < HABIT_SHARE


def test_what_keeps_a_gate_open_does_not_open_one():
    survival = np.array([[0.5, 0.3]] * 4)
    gain = best_drafts(survival, StepShape(4, 4), known_cost(8e-4)).gain
    assert Load().least_gain < gain < Load(closed=True).least_gain


def test_a_closed_gate_is_tried_for_one_request_only():
    engine = Engine(survive=0.02)
    engine.run(32, 60)
    opened = [engine.step(32) for _ in range(300)]
    assert max(opened) == 1 / 32


def test_an_open_load_tries_plain_steps_in_a_row_and_a_closed_one_a_single_draft():
    for closed, tries in ((False, FIRST_STEPS), (True, 1)):
        load = Load(closed=closed, decisions={False: 9, True: 9}, same=REFRESH_EVERY)
        for _ in range(tries):
            assert load.untried() is closed
            load.note(closed, trying=True)
        assert load.untried() is None
