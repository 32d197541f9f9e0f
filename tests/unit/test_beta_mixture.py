import warnings

import numpy as np
import pytest
from scipy.stats import beta

from vllm_accel import ConfigError
from vllm_accel.gating.beta_mixture import NEVER_EXIT, BetaMixture

CASES = {  # agree and disagree samples as (count, a, b); shared/reference/papers.md 2.6
    "A": ((200, 8, 2), (50, 2, 3)),
    "B": ((300, 5, 1), (100, 3, 2)),
    "C": ((300, 12, 1), (100, 6, 1)),
    "D": ((300, 5, 1), (0, 1, 1)),
    "E": ((0, 1, 1), (300, 2, 3)),
    "G": ((200, 4, 2), (50, 9, 2)),
}


def samples(agree, disagree):
    parts = [beta.ppf((np.arange(n) + 0.5) / n, a, b) for n, a, b in (agree, disagree)]
    return np.concatenate(parts), np.arange(agree[0] + disagree[0]) < agree[0]


def fitted(mode, agree, disagree, **settings):
    mixture = BetaMixture(mode, **settings)
    mixture.fit(*samples(agree, disagree))
    return mixture


@pytest.fixture(autouse=True)
def no_warning_is_hidden():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("case", "threshold"),
    [("A", 0.6333), ("B", 0.70), ("C", 0.90), ("D", 0.30), ("E", 0.30), ("G", 0.70)],
)
def test_published_mode_gives_the_thresholds_of_the_repository(case, threshold):
    assert fitted("published", *CASES[case]).threshold() == pytest.approx(
        threshold, abs=5e-5
    )


@pytest.mark.parametrize(
    ("case", "agree", "disagree"),
    [
        ("A", (8.03, 2.01), (2.00, 3.00)),
        ("B", (5.01, 1.00), (3.01, 2.00)),
        # papers.md prints 6.09; the repository's own formulas give 6.0846, as here.
        ("C", (12.09, 1.01), (6.08, 1.01)),
    ],
)
def test_published_mode_fits_the_components_of_the_repository(case, agree, disagree):
    trusted, other = fitted("published", *CASES[case])._pair
    assert (trusted.a, trusted.b) == pytest.approx(agree, abs=0.005)
    assert (other.a, other.b) == pytest.approx(disagree, abs=0.005)


def test_published_mode_cannot_tell_one_class_from_none():
    for case in "DE":
        probability = fitted("published", *CASES[case]).probability(np.linspace(0, 1, 9))
        assert probability.tolist() == pytest.approx([0.5] * 9)


def test_published_mode_trusts_the_larger_mean_though_it_disagrees():
    trusted, other = fitted("published", *CASES["G"])._pair
    assert trusted.mean == pytest.approx(9 / 11, abs=0.01)
    assert other.mean == pytest.approx(4 / 6, abs=0.01)


@pytest.mark.parametrize("mode", ["published", "priors"])
def test_one_sample_leaves_the_initial_threshold(mode):
    mixture = BetaMixture(mode)
    assert mixture.threshold() == 0.9
    mixture.fit(np.array([0.95]), np.array([True]))
    assert mixture.threshold() == 0.9
    assert np.isfinite(mixture.probability(np.array([0.0, 0.5, 1.0]))).all()


@pytest.mark.parametrize(
    ("case", "above", "at_most"),
    [("A", 0.4333, 0.50), ("B", 0.50, 0.5667), ("C", 0.6333, 0.70)],
)
def test_priors_mode_refines_the_grid_value_that_true_priors_would_give(
    case, above, at_most
):
    assert above < fitted("priors", *CASES[case]).threshold() <= at_most + 0.005


def test_priors_mode_is_close_to_the_true_probability():
    x = np.linspace(0.05, 0.95, 19)
    agree, disagree = 200 * beta.pdf(x, 8, 2), 50 * beta.pdf(x, 2, 3)
    estimate = fitted("priors", *CASES["A"]).probability(x)
    assert estimate == pytest.approx(agree / (agree + disagree), abs=0.01)


def test_priors_mode_keeps_the_initial_threshold_without_disagreement():
    mixture = fitted("priors", *CASES["D"])
    assert mixture.threshold() == 0.9
    assert mixture.probability(np.array([0.1, 0.9])).tolist() == [301 / 302] * 2


@pytest.mark.parametrize("agreed", [0, 9])
def test_priors_mode_never_exits_where_it_saw_disagreement_alone(agreed):
    mixture = fitted("priors", (agreed, 5, 1), (300, 2, 3))
    assert mixture.threshold() == NEVER_EXIT
    assert (mixture.probability(np.array([0.1, 0.9])) < 0.05).all()


def test_priors_mode_does_not_take_the_larger_mean_for_agreement():
    mixture = fitted("priors", *CASES["G"])
    x = np.linspace(0.3, 1, 8)
    assert (np.diff(mixture.probability(x)) < 0).all()
    confidence, agree = samples(*CASES["G"])
    exits = confidence > mixture.threshold()
    assert agree[exits].mean() > 0.4


@pytest.mark.parametrize(("disagreed", "zeta"), [(200, 0.4), (50, 0.6)])
def test_priors_mode_never_exits_where_the_surest_are_wrong(disagreed, zeta):
    mixture = fitted("priors", (200, 4, 2), (disagreed, 9, 2), zeta=zeta)
    assert mixture.threshold() == NEVER_EXIT


def test_priors_mode_exits_no_more_often_for_a_stricter_zeta():
    thresholds = [
        fitted("priors", *CASES["B"], zeta=zeta).threshold() for zeta in (0.2, 0.5, 0.8)
    ]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


def test_priors_mode_endures_confidences_that_are_all_alike():
    mixture = BetaMixture("priors")
    confidence = np.repeat([1.0, 0.2], 50)
    mixture.fit(confidence, confidence == 1)
    assert 0.2 < mixture.threshold() < 1
    assert mixture.probability(np.array([0.2, 1.0])) == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize("mode", ["published", "priors"])
def test_a_confidence_that_is_no_number_is_left_out(mode):
    confidence, agree = samples(*CASES["A"])
    mixture = BetaMixture(mode)
    mixture.fit(np.append(confidence, [np.nan, np.inf]), np.append(agree, [True, False]))
    assert mixture.threshold() == fitted(mode, *CASES["A"]).threshold()


def test_a_new_fit_replaces_the_old_one():
    mixture = fitted("priors", *CASES["A"])
    mixture.fit(np.array([]), np.array([], dtype=bool))
    assert mixture.threshold() == 0.9


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="published or priors"):
        BetaMixture("em")
