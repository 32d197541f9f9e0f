"""FREE's goodput gate: it drafts where measured time says so, and as far."""

import numpy as np
import pytest
import torch

from vllm_accel.free.exit_head import ExitSignals
from vllm_accel.free.goodput import ExitGoodput
from vllm_accel.free.stack import Seen
from vllm_accel.gating.cost import StepShape

CAP = 4


class World:
    """An engine's clock, and models that agree with a chance the confidence tells."""

    def __init__(self, *, agree, shallow_ms, row_ms=0.1, requests=1):
        self.gate = ExitGoodput(CAP)
        self._random = np.random.default_rng(0)
        self._agree, self._shallow_ms, self._row_ms = agree, shallow_ms, row_ms
        self.req_ids = [str(i) for i in range(requests)]
        self._waits = 0  # rows drafted in the step before

    def _signals(self, req_ids, chance):
        logits = torch.zeros(len(req_ids), 2)
        logits[:, 0] = float(np.log((1 + chance) / (1 - chance)))  # of that margin
        return ExitSignals(logits, req_ids)

    def step(self):
        """One step; tokens drafted."""
        admitted = self.gate.admit(self.req_ids, len(self.req_ids))
        open_ = [r for r, yes in zip(self.req_ids, admitted, strict=True) if yes]
        stacks = {r: ([], []) for r in open_}
        shallow_steps = shallow_rows = 0
        while open_:
            shallow_steps += 1
            shallow_rows += len(open_)
            chance = float(
                np.clip(self._agree + self._random.uniform(-0.2, 0.2), 0.01, 0.99)
            )
            exits = self.gate.exits(self._signals(open_, chance))
            for req_id, yes in zip(open_, exits, strict=True):
                stacks[req_id][0].append(chance)
                stacks[req_id][1].append(yes)
            open_ = [r for r, yes in zip(open_, exits, strict=True) if yes]
            open_ = [r for r in open_ if len(stacks[r][0]) < CAP]
            if open_ and not self.gate.goes_on(open_):
                break
        drafted = sum(sum(exited) for _, exited in stacks.values())
        self._tell_time(stacks, shallow_steps, shallow_rows)
        self._waits = drafted
        for req_id, (sure, exited) in stacks.items():
            self._tell_truth(req_id, sure, sum(exited))
        return drafted

    def _tell_time(self, stacks, shallow_steps, shallow_rows):
        requests = len(self.req_ids)
        rows = requests + self._waits
        opened = len(stacks)
        shape = (rows, requests, 0, opened, shallow_steps, shallow_rows, self._waits)
        ms = 6 + self._row_ms * rows + self._shallow_ms * shallow_steps
        ms *= self._random.normal(1, 0.02)
        self.gate.observe(StepShape(*shape), ms / 1e3)

    def _tell_truth(self, req_id, sure, drafted):
        agree = []
        for chance in sure:
            agree.append(bool(self._random.random() < chance))
            if not agree[-1]:
                break
        stood = sum(agree[:drafted])
        self.gate.learn(Seen(req_id, drafted, sure[: len(agree)], agree, stood))


def mean_drafts(steps=300, **world):
    there = World(**world)
    drafted = [there.step() / len(there.req_ids) for _ in range(steps)]
    return float(np.mean(drafted[steps // 2 :]))


def test_a_cheap_shallow_model_that_agrees_drafts_nearly_to_the_cap():
    assert mean_drafts(agree=0.95, shallow_ms=1.5) > 0.85 * CAP


def test_a_shallow_model_that_never_agrees_closes_the_gate():
    assert mean_drafts(agree=0.02, shallow_ms=1.5) < 0.2


def test_shallow_steps_as_dear_as_plain_ones_close_the_gate():
    assert mean_drafts(agree=0.8, shallow_ms=6.5) < 0.3


def test_dear_rows_at_load_close_the_gate():
    assert mean_drafts(agree=0.6, shallow_ms=3.0, row_ms=2.0, requests=16) < 0.3


@pytest.mark.parametrize("agree", [0.55, 0.7])
def test_dearer_shallow_steps_are_never_taken_more_often(agree):
    cheap = mean_drafts(agree=agree, shallow_ms=1.0)
    dear = mean_drafts(agree=agree, shallow_ms=4.0)
    assert cheap > dear


def test_a_gate_that_closed_on_a_hard_beginning_opens_again():
    there = World(agree=0.05, shallow_ms=1.5)
    assert sum(there.step() for _ in range(60)) < 60
    there._agree = 0.95
    later = [there.step() for _ in range(150)]
    assert np.mean(later[-50:]) > 0.7 * CAP


def test_a_shallow_model_that_never_agrees_is_looked_at_ever_less():
    there = World(agree=0.02, shallow_ms=1.5)
    for _ in range(300):
        there.step()
    looks = [there.step() for _ in range(1000)]
    assert sum(looks) < 30


def test_a_step_that_may_not_draft_counts_as_neither_kind():
    gate = ExitGoodput(CAP)
    for _ in range(3):
        gate.admit(["a"], 1)  # three plain steps are tried first
    assert gate.admit(["a"], 1) == [True]
    assert gate.admit(["a"], 1) == [True]  # and asked again until one could


def test_what_the_next_steps_cost_is_foreseen_as_if_asked_each_time():
    there = World(agree=0.9, shallow_ms=0.5, requests=40)  # rows cost more from some on
    for _ in range(200):
        there.step()
    gate = there.gate
    gate.admit(there.req_ids, 40)
    for going_on in (40, 40, 25, 25):
        gate.exits(there._signals(there.req_ids[:going_on], 0.99))
        shape = gate._shape(np.array([0, 1]), going_on)
        now, then = gate.cost.seconds(shape)
        assert gate._next_seconds(going_on) == pytest.approx(then - now)
