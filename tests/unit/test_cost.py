import json

import numpy as np
import pytest

from vllm_accel import ConfigError
from vllm_accel.gating import cost as step_cost
from vllm_accel.gating.cost import StepCost, StepShape


def true_seconds(shape):
    """A machine whose rows get dearer once it computes."""
    seconds = 4e-3 + 5e-5 * shape.decode_rows + 8e-5 * shape.requests
    seconds += 1.5e-4 * max(shape.decode_rows - 32, 0) + 2e-5 * shape.prefill_tokens
    return seconds + (6e-4 + 3e-5 * shape.drafted_for if shape.drafted_for else 0)


def mixed_steps(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        requests = int(rng.choice([1, 2, 4, 8, 16, 32]))
        drafting = rng.random() < 0.5
        drafts = requests * int(rng.integers(0, 5)) if drafting else 0
        prefill = int(rng.choice([0, 0, 0, 200]))
        yield StepShape(requests + drafts, requests, prefill, requests * drafting)


def learnt(steps=600, disturb=0.0):
    rng = np.random.default_rng(1)
    cost = StepCost()
    for shape in mixed_steps(steps):
        noise = rng.lognormal(0, 0.05) * (10 if rng.random() < disturb else 1)
        cost.observe(shape, true_seconds(shape) * noise)
    return cost


def median_error(cost):
    errors = [
        abs(cost.seconds(shape)[0] / true_seconds(shape) - 1)
        for shape in mixed_steps(300, seed=2)
    ]
    return np.median(errors)


def test_seconds_are_learnt_through_noise_and_outliers():
    assert median_error(learnt()) < 0.02
    assert median_error(learnt(disturb=0.02)) < 0.03


def test_a_machine_that_becomes_slower_is_followed():
    cost = learnt()
    for shape in mixed_steps(600, seed=3):
        cost.observe(shape, 2 * true_seconds(shape))
    assert cost.seconds(StepShape(1, 1))[0] == pytest.approx(
        2 * true_seconds(StepShape(1, 1)), rel=0.1
    )


def test_what_is_not_seen_for_long_keeps_its_price():
    cost = learnt()
    for _ in range(2000):
        cost.observe(StepShape(1, 1), true_seconds(StepShape(1, 1)))
    busy = StepShape(160, 32, 0, 32)
    assert cost.seconds(busy)[0] == pytest.approx(true_seconds(busy), rel=0.1)


def test_many_steps_are_predicted_at_once():
    cost = learnt()
    many = cost.seconds(StepShape(np.array([1, 5]), 1, 0, np.array([0, 1])))
    one_by_one = [cost.seconds(s)[0] for s in (StepShape(1, 1), StepShape(5, 1, 0, 1))]
    assert many.tolist() == pytest.approx(one_by_one)


def test_what_was_learnt_survives_json():
    cost, again = learnt(), StepCost()
    again.load_state_dict(json.loads(json.dumps(cost.state_dict())))
    assert median_error(again) == median_error(cost)


@pytest.mark.parametrize("state", [{}, {"prices": [1.0], "information": [[1.0]]}, []])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ConfigError, match="saved step cost"):
        StepCost().load_state_dict(state)


PLAIN, DRAFTED = StepShape(1, 1), StepShape(5, 1, 0, 1)


def only(shape, seconds):
    """What is learnt where all steps are alike."""
    cost = StepCost()
    for _ in range(64):
        cost.observe(shape, seconds)
    return cost.state_dict()


def test_what_two_learnt_apart_is_known_together():
    plain, drafted = only(PLAIN, 0.004), only(DRAFTED, 0.006)
    both = StepCost()
    both.load_state_dict(step_cost.merge([plain, drafted]))
    assert both.seconds(PLAIN)[0] == pytest.approx(0.004, rel=0.05)
    assert both.seconds(DRAFTED)[0] == pytest.approx(0.006, rel=0.05)
    assert both.steps == plain["steps"]


def test_merging_again_makes_nobody_surer():
    state = only(PLAIN, 0.004)
    again = step_cost.merge([state, state, state])
    np.testing.assert_allclose(again["information"], state["information"])


def test_costs_of_other_versions_do_not_merge():
    state = only(PLAIN, 0.004)
    other = {**state, "prices": [0.1], "information": [[1.0]]}
    with pytest.raises(ConfigError, match="cannot be merged"):
        step_cost.merge([state, other])
