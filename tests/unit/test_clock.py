import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm_accel.gating.cost import StepShape
from vllm_accel.host.v1.clock import StepClock, shape_of


def step(tokens, drafts=None, new=()):
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        scheduled_spec_decode_tokens=drafts or {},
        scheduled_new_reqs=[SimpleNamespace(req_id=req_id) for req_id in new],
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def test_rows_of_decoding_requests_and_of_prompts_are_told_apart():
    output = step({"a": 4, "b": 1, "c": 50, "d": 1}, {"a": [1, 2, 3]}, new=["d"])
    assert shape_of(output, 2, waited=True) == StepShape(5, 2, 51, 2, 1)


def test_the_time_is_from_end_to_end():
    clock = StepClock()
    assert clock.end(step({"a": 1}), 0, waited=False, busy=True) is None
    time.sleep(0.02)
    measured = clock.end(step({"a": 1}), 1, waited=True, busy=True)
    assert measured.shape == StepShape(1, 1, 0, 1, 1)
    assert measured.seconds >= 0.02


@pytest.mark.parametrize(("busy", "tokens"), [(False, {"a": 1}), (True, {})])
def test_idle_time_and_empty_steps_are_not_measured(busy, tokens):
    clock = StepClock()
    clock.end(step({"a": 1}), 0, waited=False, busy=busy)
    assert clock.end(step(tokens), 0, waited=False, busy=True) is None
