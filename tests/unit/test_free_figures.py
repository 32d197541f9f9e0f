"""Held-out figures of an exit against values counted by hand."""

import pytest
import torch

from vllm_accel.training import exit_figures
from vllm_accel.training.exit_figures import ExitObservations, area_under_roc


def seen(agree, confidence, ends=None):
    said = torch.tensor([[7, 7 if yes else 8] for yes in agree])
    ends = ends or [False] * (len(agree) - 1) + [True]
    states = torch.zeros(len(agree), 4)
    sure = torch.tensor(confidence)
    return ExitObservations(states, states, said, sure, torch.tensor(ends))


@pytest.mark.parametrize(
    ("agree", "ends", "mean"),
    [
        ([1, 1, 0, 1], None, 3 / 2),  # a run of two, one cut off by the end
        ([1, 1, 1, 0], None, 3 / 1),
        ([0, 0], None, 0.0),
        ([1, 1], None, 2.0),
        ([1, 1, 1, 0, 1], [0, 1, 0, 0, 1], 4 / 3),  # two texts
    ],
)
def test_a_run_goes_from_one_mistake_to_the_next(agree, ends, mean):
    bools = None if ends is None else list(map(bool, ends))
    assert seen(agree, [0.5] * len(agree), bools).mean_run() == pytest.approx(mean)


def test_the_table_counts_exits_above_each_threshold():
    lines = seen([1, 0, 1, 1], [0.05, 0.3, 0.55, 0.97]).exit_table()
    table = {line["threshold"]: line for line in lines}
    assert table[0.0]["exit_rate"] == 1.0
    assert (table[0.1]["exit_rate"], table[0.1]["agreement"]) == (0.75, 0.6667)
    assert (table[0.5]["exit_rate"], table[0.5]["agreement"]) == (0.5, 1.0)
    assert (table[0.99]["exit_rate"], table[0.99]["agreement"]) == (0.0, None)


def test_raising_the_threshold_never_exits_more():
    torch.manual_seed(0)
    confidence = torch.rand(500).tolist()
    rates = [line["exit_rate"] for line in seen([1] * 500, confidence).exit_table()]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("agree", "confidence", "threshold"),
    [
        ([1, 1, 0, 1], [0.9, 0.8, 0.45674, 0.3], 0.4568),  # rounded up, so it stays out
        ([1, 1, 1], [0.9, 0.8, 0.7], 0.0),
        ([0, 1, 1], [0.9, 0.8, 0.7], 1.0),
    ],
)
def test_above_the_saved_threshold_exits_agree(agree, confidence, threshold):
    assert seen(agree, confidence).threshold() == pytest.approx(threshold)


def test_one_mistake_in_a_hundred_is_allowed():
    agree = [1] * 99 + [0] + [1] * 100 + [0] * 50
    confidence = torch.linspace(0.99, 0.01, len(agree)).tolist()
    found = seen(agree, confidence)
    leaves = found.confidence > found.threshold()
    assert int(leaves.sum()) >= 200
    assert float(found.agree[leaves].float().mean()) >= exit_figures.QUALITY


@pytest.mark.parametrize(
    ("score", "positive", "area"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0], 0.0),
        ([0.5, 0.5, 0.5], [1, 0, 1], 0.5),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([0.1, 0.2], [1, 1], None),
        ([0.1, 0.2], [0, 0], None),
    ],
)
def test_the_area_under_the_curve_counts_pairs_in_order(score, positive, area):
    found = area_under_roc(torch.tensor(score), torch.tensor(positive, dtype=torch.bool))
    assert found == area


def test_the_area_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    score, positive = torch.randint(0, 20, (300,)).float(), torch.rand(300) < 0.3
    pairs = int(positive.sum()) * int((~positive).sum())
    u = stats.mannwhitneyu(score[positive].numpy(), score[~positive].numpy()).statistic
    assert area_under_roc(score, positive) == pytest.approx(u / pairs)
