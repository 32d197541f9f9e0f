import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest

from vllm_accel import ConfigError
from vllm_accel.lazyllm.config import LazyConfig, requested_keep
from vllm_accel.lazyllm.schedule import Schedule, default_points, shares
from vllm_accel.spans import padding_ratio, spans_between

EVERY_KEY = {
    "prune_after": [2, 4],
    "keep": [0.5, 0.2],
    "progressive": False,
    "choose": "random",
    "observe": 8,
    "spread": 4,
    "look_ahead": False,
    "granularity": "token",
    "pooling": "max",
    "min_prompt": 100,
    "max_whole_prompt": 4096,
    "sink": 4,
    "recent": 64,
    "revive": "off",
    "revive_every": 3,
    "revive_pages": 2,
}


def schedule(num_layers=12, block_size=4, **settings):
    config = LazyConfig(**{"granularity": "page"} | settings)
    return Schedule.of(config, num_layers=num_layers, block_size=block_size)


def test_a_config_survives_json():
    config = LazyConfig.from_mapping(EVERY_KEY)
    assert LazyConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config
    assert set(EVERY_KEY) == {field.name for field in dataclasses.fields(LazyConfig)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kep": 0.5}, "did you mean 'keep'"),
        ({"prune_after": (8, 4)}, "is not in order"),
        ({"prune_after": (4, 4)}, "is not in order"),
        ({"prune_after": ()}, "is not in order"),
        ({"prune_after": (0, 4)}, "is not in order"),
        ({"prune_after": 4}, "is not in order"),
        ({"keep": 0}, "expected a share above 0 and at most 1"),
        ({"keep": 1.5}, "expected a share above 0 and at most 1"),
        ({"keep": float("nan")}, "expected a share above 0"),
        ({"keep": "half"}, "expected a share above 0"),
        ({"keep": True}, "expected a share above 0"),
        ({"prune_after": (4, 8), "keep": (0.2, 0.5)}, "none larger than the one before"),
        ({"prune_after": (4, 8), "keep": (0.5,)}, "has 1 shares: expected one per"),
        ({"keep": (0.5, 0.2)}, "give both, or one number"),
        ({"choose": "length"}, "expected attention or random"),
        ({"progressive": 1}, "expected true or false"),
        ({"granularity": "word"}, "expected page or token"),
        ({"pooling": ["max"]}, "expected mean or max"),
        ({"min_prompt": 0}, "expected a whole number from 1 up"),
        ({"recent": 0}, "expected a whole number from 1 up"),
        ({"sink": 1.5}, "expected a whole number from 0 up"),
        ({"revive": "always"}, "expected budget or off"),
        ({"revive_pages": False}, "expected a whole number from 1 up"),
        ({"granularity": "token", "revive": "budget"}, "kernels read whole pages"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LazyConfig.from_mapping(settings)


@pytest.mark.parametrize("value", [None, "page", 7, ["keep"]])
def test_what_is_no_config_is_refused(value):
    with pytest.raises(ConfigError, match="expected a mapping"):
        LazyConfig.from_mapping(value)


def test_tokens_do_not_come_back_and_pages_do_unless_told_not_to():
    assert not LazyConfig().revives
    assert LazyConfig(granularity="page").revives
    assert not LazyConfig(granularity="page", revive="off").revives


def test_of_single_tokens_fewer_are_kept_than_of_pages():
    assert LazyConfig().kept < LazyConfig(granularity="page").kept
    assert LazyConfig(keep=0.3).kept == LazyConfig(granularity="page", keep=0.3).kept == 0.3


@pytest.mark.parametrize(
    ("asked", "keep"),
    [
        (None, None),
        ({}, None),
        ({"lazyllm": {}}, None),
        ({"lazyllm": {"keep": 0.5}}, 0.5),
        ({"lazyllm": 1}, 1),
        ({"lazyllm": [0.5, 0.2]}, (0.5, 0.2)),
    ],
)
def test_a_request_may_ask_for_its_own_share(asked, keep):
    assert requested_keep(asked, num_points=2) == keep


@pytest.mark.parametrize(
    "asked", [2, "1", [0.5], [0.2, 0.5], {"keep": -1}, {"kept": 1}, True]
)
def test_a_request_that_asks_for_something_else_is_refused(asked):
    with pytest.raises(ConfigError):
        requested_keep({"lazyllm": asked}, num_points=2)


def test_one_number_is_reached_step_by_step_early_points_pruning_most():
    assert shares(0.1, 2) == pytest.approx((1.0, 0.196, 0.1), abs=1e-3)
    four = shares(0.1, 4)
    assert (four[0], four[-1]) == (1.0, pytest.approx(0.1))
    factors = [later / earlier for earlier, later in pairwise(four)]
    assert factors == sorted(factors), "the first point prunes most"
    assert shares((0.6, 0.1), 2) == (1.0, 0.6, 0.1)


def test_static_pruning_comes_down_at_once_for_a_request_too():
    plan = schedule(keep=0.25, progressive=False)
    assert plan.keep == (1.0, 0.25, 0.25)
    assert plan.with_keep(0.5).keep == (1.0, 0.5, 0.5)


@pytest.mark.parametrize(
    "num_layers", [3, 4, 12, 16, 22, 26, 28, 30, 31, 32, 36, 40, 61, 80]
)
def test_default_points_are_early_and_waste_little(num_layers):
    first, second = default_points(num_layers)
    spans = spans_between((first, second), num_layers)
    assert padding_ratio(spans) <= 0.1
    assert num_layers / 4 <= first <= num_layers / 2.8


def test_a_model_too_shallow_for_spans_is_refused():
    with pytest.raises(ConfigError, match="at least 3 layers"):
        default_points(2)


def test_a_point_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"expected layer counts from 1 to 11"):
        schedule(prune_after=(4, 12))


def test_kept_are_those_that_always_stay_and_the_share_of_the_others_rounded_up():
    plan = schedule(prune_after=(3, 6), keep=(0.1, 0.01))
    assert plan.num_kept(0, 0, 120, 2) == 30
    assert plan.num_kept(1, 0, 120, 2) == 2 + 3
    assert plan.num_kept(2, 0, 120, 2) == 2 + 1
    assert plan.num_kept(1, 82, 120, 1) == 1 + 1
    assert schedule(prune_after=(3, 6), keep=(0.07, 0.07)).num_kept(1, 0, 400, 0) == 7


def test_single_tokens_are_kept_until_they_fill_pages():
    plan = schedule(prune_after=(3, 6), keep=(0.1, 0.01), granularity="token")
    assert plan.num_kept(0, 0, 120, 2) == 120
    assert plan.num_kept(1, 0, 120, 2) == 16
    assert plan.num_kept(2, 0, 120, 2) == 4
    assert plan.num_kept(1, 0, 118, 2) == 14


def test_sink_window_last_token_and_a_page_begun_before_are_always_kept():
    plan = schedule(sink=5, recent=6, observe=1)
    whole = plan.always_kept(39, 0, 39)
    assert np.flatnonzero(whole).tolist() == [0, 1, 8, 9]
    piece = plan.always_kept(39, 10, 22)
    assert np.flatnonzero(piece).tolist() == [0, 1, 2, 5, 8, 9]


def test_those_by_whom_others_are_judged_are_always_kept():
    plan = schedule(sink=0, recent=1, observe=6, granularity="token")
    assert np.flatnonzero(plan.always_kept(39, 0, 20)).tolist() == [*range(14, 20), 38]
    assert np.flatnonzero(plan.always_kept(39, 17, 20)).tolist() == [17, 18, 19, 38]


def test_no_prompt_parks_more_than_it_was_given_room_for():
    plan = schedule(keep=0.2, sink=0, recent=1)
    assert plan.most_parked(40) == 28
    assert plan.most_parked(41) == 32
    assert schedule(keep=1.0).most_parked(40) == 0


def test_ratios_are_those_of_the_schedule():
    plan = schedule(prune_after=(4, 8), keep=(0.5, 0.25), sink=0, recent=1, observe=1)
    assert plan.layers_ratio() == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert plan.pages_ratio(4000, float("inf")) == pytest.approx(1.75 / 3, abs=1e-3)
    aux = (4000 * 0.75 / 16) / 3000
    assert plan.pages_ratio(4000, 16) == pytest.approx(1.75 / 3 + aux, abs=2e-3)


def test_short_prompts_and_those_kept_whole_are_left_alone():
    plan = schedule(keep=0.5, min_prompt=100)
    assert [plan.prunes(n) for n in (99, 100)] == [False, True]
    assert not plan.with_keep(1.0).prunes(100)
    assert schedule(keep=1.0).with_keep((0.5, 0.5)).prunes(2000)
