import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm_accel.gating.cost import StepShape
from vllm_accel.host.v1.clock import StepClock, shape_of
from vllm_accel.speculate import StepReport

NOTHING = StepReport()


def step(tokens, drafts=None, new=()):
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        scheduled_spec_decode_tokens=drafts or {},
        scheduled_new_reqs=[SimpleNamespace(req_id=req_id) for req_id in new],
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def test_rows_of_decoding_requests_and_of_prompts_are_told_apart():
    output = step({"a": 4, "b": 1, "c": 50, "d": 1}, {"a": [1, 2, 3]}, new=["d"])
    report = StepReport(drafted_for=2, verified={"a": 3})
    assert shape_of(output, report) == StepShape(5, 2, 51, 2)


def test_room_for_drafts_that_stayed_empty_is_no_row():
    output = step({"a": 5, "b": 5}, {"a": [-1] * 4, "b": [-1] * 4})
    report = StepReport(verified={"a": 1})
    assert shape_of(output, report) == StepShape(3, 2, 0)


def test_the_time_is_from_end_to_end():
    clock = StepClock()
    assert clock.end(step({"a": 1}), NOTHING, busy=True) is None
    time.sleep(0.02)
    measured = clock.end(step({"a": 1}), StepReport(drafted_for=1), busy=True)
    assert measured.shape == StepShape(1, 1, 0, 1)
    assert measured.seconds >= 0.02


@pytest.mark.parametrize(("busy", "tokens"), [(False, {"a": 1}), (True, {})])
def test_idle_time_and_empty_steps_are_not_measured(busy, tokens):
    clock = StepClock()
    clock.end(step({"a": 1}), NOTHING, busy=busy)
    assert clock.end(step(tokens), NOTHING, busy=True) is None


def test_what_ran_in_the_first_layers_alone_is_part_of_the_shape():
    report = StepReport(drafted_for=1, shallow_steps=3, shallow_rows=4, kept_rows=2)
    shape = shape_of(step({"a": 1}), report)
    assert shape == StepShape(1, 1, 0, 1, 3, 4, 2)
