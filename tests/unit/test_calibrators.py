import json

import numpy as np
import pytest

from vllm_accel import ConfigError
from vllm_accel.gating.calibrators import OnlineLogistic, merge

GROUPS = 4
TRUE = np.array(  # [groups, 1 + features]
    [
        [1.0, -1.0, 0.5, 0.0, 0.8],
        [0.5, -1.2, 0.0, 0.4, 0.3],
        [0.0, 0.7, -0.5, 0.2, 0.0],
        [-0.7, 0.3, 0.9, -0.6, 0.5],
    ]
)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def stream(weights, count, seed=0):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, GROUPS, weights.shape[1] - 1))
    probability = sigmoid(weights[:, 0] + (features * weights[:, 1:]).sum(-1))
    return features, probability, random.random(probability.shape) < probability


def untaught(**settings):
    return OnlineLogistic(np.zeros_like(TRUE), **settings)


def teach(model, features, outcome, batch=1):
    """Returns the probabilities that were given before each verdict was known."""
    given = []
    for start in range(0, len(features), batch):
        part = slice(start, start + batch)
        given.append(model.probability(features[part]))
        model.update(features[part], outcome[part], np.ones_like(outcome[part]))
    return np.concatenate(given)


def error(model, weights):
    features, probability, _ = stream(weights, 500, seed=9)
    return np.abs(model.probability(features) - probability).mean()


@pytest.mark.parametrize("batch", [1, 16])
def test_the_weights_behind_the_data_are_found(batch):
    model = untaught(decay=1.0)
    features, _, outcome = stream(TRUE, 4000)
    teach(model, features, outcome, batch)
    assert np.array(model.state_dict()["weights"]) == pytest.approx(TRUE, abs=0.2)
    assert error(model, TRUE) < 0.02


def test_a_few_dozen_verdicts_already_help():
    model = untaught()
    before = error(model, TRUE)
    features, _, outcome = stream(TRUE, 48)
    teach(model, features, outcome)
    assert error(model, TRUE) < 0.6 * before


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_what_is_given_as_probability_happens_that_often(batch):
    features, _, outcome = stream(TRUE, 3008)
    given = teach(untaught(), features, outcome, batch)
    bins = np.minimum((given * 10).astype(int), 9)
    gaps = [
        (bins == b).mean() * abs(given[bins == b].mean() - outcome[bins == b].mean())
        for b in np.unique(bins)
    ]
    assert sum(gaps) < 0.05


@pytest.mark.parametrize(
    "change",
    [lambda w: w - np.eye(5)[0] * 3, lambda w: w * [1, -1, -1, -1, -1]],
    ids=["rarer", "other-reasons"],
)
def test_a_shift_is_followed_within_two_hundred_verdicts(change):
    model, shifted = untaught(), change(TRUE)
    features, _, outcome = stream(TRUE, 2000)
    teach(model, features, outcome)
    before = error(model, shifted)
    features, _, outcome = stream(shifted, 200, seed=1)
    teach(model, features[:100], outcome[:100])
    assert error(model, shifted) < 0.5 * before
    teach(model, features[100:], outcome[100:])
    assert error(model, shifted) < 0.08 < before


def test_certainty_of_long_standing_gives_way():
    model = untaught()
    features, _, outcome = stream(TRUE, 3000)
    always = np.ones_like(outcome)
    teach(model, features, always)
    assert model.probability(features).mean() > 0.98
    teach(model, features[:150], ~always[:150])
    assert model.probability(features).mean() < 0.15


def test_the_prior_answers_before_there_is_data():
    features, probability, _ = stream(TRUE, 10)
    given = OnlineLogistic(TRUE).probability(features)
    assert given.dtype == np.float64
    assert given == pytest.approx(probability)


def test_a_stronger_prior_gives_way_more_slowly():
    features, _, outcome = stream(TRUE, 30)
    errors = []
    for strength in (2.0, 8.0, 200.0):
        model = OnlineLogistic(-TRUE, prior_strength=strength)
        teach(model, features, outcome)
        errors.append(error(model, TRUE))
    assert errors == sorted(errors)


def test_outcomes_that_are_not_known_change_nothing():
    model = untaught()
    features, _, outcome = stream(TRUE, 40)
    teach(model, features[:20], outcome[:20])
    before = model.state_dict()
    model.update(features[20:], outcome[20:], np.zeros_like(outcome[20:]))
    assert model.state_dict() == before


def test_a_group_learns_from_its_own_verdicts_only():
    model = untaught()
    features, _, outcome = stream(TRUE, 40)
    known = np.zeros_like(outcome)
    known[:, 1] = True
    before = model.probability(features)
    model.update(features, outcome, known)
    moved = np.abs(model.probability(features) - before).max(0)
    assert (moved > 0).tolist() == [False, True, False, False]


def test_no_requests_are_no_news():
    model = untaught()
    before = model.state_dict()
    nothing = np.zeros((0, GROUPS), dtype=bool)
    model.update(np.zeros((0, GROUPS, 4)), nothing, nothing)
    assert model.state_dict() == before
    assert model.probability(np.zeros((0, GROUPS, 4))).shape == (0, GROUPS)


@pytest.mark.parametrize("value", [1e300, np.inf, -np.inf, np.nan])
def test_extreme_features_stay_finite(value):
    model = untaught()
    features, _, outcome = stream(TRUE, 200)
    features[::3, :, 1] = value
    given = teach(model, features, outcome)
    assert ((given > 0) & (given < 1)).all()
    assert np.isfinite(model.state_dict()["precision"]).all()


@pytest.mark.parametrize("features", [(0.3, -2.0), (50.0, 1.0), (float("nan"), 9.0)])
def test_one_line_in_plain_numbers_is_a_line_of_an_array(features):
    model = OnlineLogistic(np.array([[0.5, 1.0, -0.7]]))
    line = np.array([[features]])
    for _ in range(3):  # and follows what is learnt
        assert model.chance(features) == pytest.approx(model.probability(line).item())
        model.update(line, np.array([[True]]), np.array([[True]]))


def test_one_surprise_does_not_overturn_what_was_learnt():
    model = untaught()
    far = np.full((1, GROUPS, 4), 8.0)
    known = np.ones((1, GROUPS), dtype=bool)
    model.update(far, known, known)
    logits = np.log(model.probability(far) / (1 - model.probability(far)))
    assert (logits <= 2.0 + 1e-9).all()


def test_a_state_survives_json():
    model, other = untaught(), untaught()
    features, _, outcome = stream(TRUE, 100)
    teach(model, features, outcome)
    other.load_state_dict(json.loads(json.dumps(model.state_dict())))
    assert (other.probability(features) == model.probability(features)).all()
    assert other.state_dict() == model.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        OnlineLogistic(TRUE[:2]).state_dict(),
        OnlineLogistic(TRUE[:, :3]).state_dict(),
        untaught().state_dict() | {"precision": [[1.0]]},
        untaught().state_dict() | {"precision": np.zeros((4, 5, 5)).tolist()},
        untaught().state_dict() | {"weights": [[1.0], []]},
        untaught().state_dict() | {"weights": None},
        untaught().state_dict() | {"weights": (TRUE * np.nan).tolist()},
    ],
)
def test_a_state_that_does_not_fit_is_refused(state):
    model = untaught()
    before = model.state_dict()
    with pytest.raises(ConfigError, match="Logistic state"):
        model.load_state_dict(state)
    assert model.state_dict() == before


def test_merging_a_state_with_itself_changes_nothing():
    model = untaught()
    features, _, outcome = stream(TRUE, 100)
    teach(model, features, outcome)
    state = model.state_dict()
    merged = merge([state, state, state])
    assert np.array(merged["weights"]) == pytest.approx(np.array(state["weights"]))
    assert np.array(merged["precision"]) == pytest.approx(np.array(state["precision"]))


def test_merged_replicas_know_more_than_each_alone():
    states, errors = [], []
    for seed in range(4):
        model = untaught()
        features, _, outcome = stream(TRUE, 150, seed=seed)
        teach(model, features, outcome)
        states.append(model.state_dict())
        errors.append(error(model, TRUE))
    together = untaught()
    together.load_state_dict(merge(states))
    assert error(together, TRUE) < min(errors)


def test_a_replica_that_saw_little_counts_little():
    taught = untaught()
    features, _, outcome = stream(TRUE, 1000)
    teach(taught, features, outcome)
    merged = merge([taught.state_dict(), untaught().state_dict()])
    expected = np.array(taught.state_dict()["weights"])
    assert np.array(merged["weights"]) == pytest.approx(expected, abs=0.1)


def test_states_that_differ_in_shape_are_not_merged():
    for states in ([], [untaught().state_dict(), OnlineLogistic(TRUE[:2]).state_dict()]):
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge(states)


@pytest.mark.parametrize(
    ("prior", "settings"),
    [
        (np.zeros(3), {}),
        (np.full((2, 3), np.nan), {}),
        (np.zeros((2, 3)), {"prior_strength": 0.0}),
        (np.zeros((2, 3)), {"decay": 1.5}),
    ],
)
def test_settings_out_of_range_are_refused(prior, settings):
    with pytest.raises(ConfigError, match="cannot be used"):
        OnlineLogistic(prior, **settings)
