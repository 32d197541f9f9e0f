"""Which kept states survive until the next forward."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm_accel.free.stack import ExitStacks
from vllm_accel.host.v1.free_runner import FreeRunnerMixin
from vllm_accel.speculate import DraftBook


class Runner:
    def execute_model(self, scheduler_output):
        self.kept = list(map(bool, [name in self.drafter.stacks for name in "abcd"]))


class FreeRunner(FreeRunnerMixin, Runner):
    def __init__(self):
        self.requests, self._book = {}, DraftBook()
        self.drafter = SimpleNamespace(stacks=ExitStacks(cap=2, max_reqs=4, state_width=2))
        for name in "abcd":
            self.drafter.stacks.open(name, 10, 7, room=2)
            rows = self.drafter.stacks.next_rows()
            states = torch.zeros(len(rows.req_ids), 2)
            count = len(rows.req_ids)
            self.drafter.stacks.push(
                rows, states, [1] * count, [0.1] * count, [False] * count
            )


def scheduled(preempted=None, resumed=(), finished=()):
    return SimpleNamespace(
        preempted_req_ids=preempted,
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set(resumed)),
        scheduled_spec_decode_tokens={},
        finished_req_ids=set(finished),
    )


def test_states_whose_cache_is_gone_are_forgotten_before_the_forward():
    runner = FreeRunner()
    runner.execute_model(scheduled(preempted={"a"}, resumed={"b"}, finished={"c"}))
    assert runner.kept == [False, False, False, True]


def test_requests_that_only_wait_keep_theirs():
    runner = FreeRunner()
    runner.execute_model(scheduled())
    assert runner.kept == [True] * 4
