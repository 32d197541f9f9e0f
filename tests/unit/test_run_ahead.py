"""When the engine may queue a step ahead, and with room for drafts."""

import pytest

pytest.importorskip("vllm")
from vllm_accel.host.v1.run_ahead import GRAMMAR_PATIENCE, PATIENCE, RunAhead, room
from vllm_accel.speculate import StepReport


def test_there_is_room_from_the_first_wish_until_some_quiet():
    run_ahead = RunAhead(allowed=True)
    assert run_ahead.on
    assert not run_ahead.makes_room
    run_ahead.note(StepReport(wanted=1))
    seen = []
    for _ in range(PATIENCE):
        assert run_ahead.makes_room
        run_ahead.note(StepReport(asked=1))
        seen.append(run_ahead.makes_room)
    assert seen == [True] * (PATIENCE - 1) + [False]


def test_steps_in_which_the_gate_was_not_asked_say_nothing():
    run_ahead = RunAhead(allowed=True)
    run_ahead.note(StepReport(wanted=1))
    for _ in range(2 * PATIENCE):
        run_ahead.note(StepReport())
    assert run_ahead.makes_room


def test_a_grammar_makes_it_wait_and_leaves_no_room():
    run_ahead = RunAhead(allowed=True)
    run_ahead.note(StepReport(wanted=1))
    run_ahead.scheduled(grammar=True)
    for _ in range(GRAMMAR_PATIENCE):
        assert not run_ahead.on
        assert not run_ahead.makes_room
        run_ahead.scheduled(grammar=False)
    assert run_ahead.makes_room


def test_it_never_runs_ahead_where_that_is_not_allowed():
    run_ahead = RunAhead(allowed=False)
    run_ahead.note(StepReport(wanted=1))
    assert not run_ahead.on
    assert not run_ahead.makes_room


@pytest.mark.parametrize(
    ("num_reqs", "budget", "expected"),
    [(1, 2048, 4), (64, 2048, 4), (256, 2048, 2), (256, 512, 0), (1, 8, 2), (0, 2048, 4)],
)
def test_room_takes_no_more_than_a_quarter_of_the_budget(num_reqs, budget, expected):
    assert room(4, num_reqs, budget) == expected
