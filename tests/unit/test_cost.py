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
    assert median_error(again) == pytest.approx(median_error(cost))


@pytest.mark.parametrize("state", [{}, {"seen_steps": [[]]}, {"seen_steps": 3}, []])
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


def test_merging_again_makes_nobody_surer():
    state = only(PLAIN, 0.004)
    again = StepCost()
    again.load_state_dict(step_cost.merge([state, state, state]))
    assert len(again.state_dict()["seen_steps"]) == len(state["seen_steps"])


def test_of_what_replicas_have_in_common_each_gives_its_newest():
    quick, slow = only(PLAIN, 0.004), only(PLAIN, 0.008)
    both = StepCost()
    both.load_state_dict(step_cost.merge([quick, slow]))
    seconds = [step[-2] for step in both.state_dict()["seen_steps"]]
    assert seconds.count(0.004) == seconds.count(0.008)


def test_prices_follow_surprises_before_usual_steps():
    """Sixteen steps to the next fit, four where each is far off."""
    seen = {}
    for seconds in (0.0042, 0.008):
        cost = StepCost()
        cost.load_state_dict(only(PLAIN, 0.004))
        before = cost.seconds(PLAIN)[0]
        for _ in range(12):
            cost.observe(PLAIN, seconds)
            after = cost.seconds(PLAIN)[0]
        seen[seconds] = after / before
    assert seen[0.0042] == 1
    assert seen[0.008] > 1.5


def test_plain_steps_stay_known_while_others_are_all_there_is():
    """A gate that stays open measures hardly any plain step, and goes by their price."""
    cost = StepCost()
    rng = np.random.default_rng(5)
    plain, drafting = StepShape(8, 8), StepShape(40, 8, 0, 8)
    for shape in [plain] * 3 + [drafting] * 1000:
        cost.observe(shape, true_seconds(shape) * rng.lognormal(0, 0.1))
    assert cost.seconds(plain)[0] == pytest.approx(true_seconds(plain), rel=0.15)


def test_one_odd_step_among_the_first_three_does_not_stay():
    cost = StepCost()
    for seconds in (0.004, 0.012, 0.004):
        cost.observe(PLAIN, seconds)
    assert cost.seconds(PLAIN)[0] == pytest.approx(0.004, rel=0.2)
