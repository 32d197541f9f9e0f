"""When the engine may queue a step ahead."""

import pytest

pytest.importorskip("vllm")
from vllm_accel.host.v1.run_ahead import PATIENCE, RunAhead
from vllm_accel.speculate import StepReport


def test_it_runs_ahead_until_a_draft_is_wanted_and_again_after_some_quiet():
    run_ahead = RunAhead(allowed=True)
    assert run_ahead.on
    run_ahead.note(StepReport(wanted=1))
    seen = []
    for _ in range(PATIENCE):
        assert not run_ahead.on
        run_ahead.note(StepReport(asked=1))
        seen.append(run_ahead.on)
    assert seen == [False] * (PATIENCE - 1) + [True]


def test_steps_in_which_the_gate_was_not_asked_say_nothing():
    run_ahead = RunAhead(allowed=True)
    run_ahead.wait()
    for _ in range(2 * PATIENCE):
        run_ahead.note(StepReport())
    assert not run_ahead.on


def test_it_never_runs_ahead_where_that_is_not_allowed():
    assert not RunAhead(allowed=False).on
