import dataclasses
import json

import pytest

from vllm_accel import ConfigError, engine_args
from vllm_accel.config import CerberusConfig, FreeConfig, parse

EVERY_KEY = {
    "method": "cerberus",
    "model": "HEADS",
    "revision": "main",
    "num_speculative_tokens": 3,
    "gate": "always",
    "entropy_threshold": 1.5,
    "check_base": False,
}


def test_a_config_survives_json():
    config = parse(EVERY_KEY)
    assert parse(json.loads(json.dumps(config.to_dict()))) == config


def test_bare_name_mapping_and_engine_args_give_one_config():
    assert parse("cerberus") == parse({"method": "cerberus"}) == CerberusConfig()
    assert parse(engine_args("cerberus")["speculative_config"]) == CerberusConfig()


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CerberusConfig().gate = "never"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"entropy_treshold": 1.0}, "did you mean 'entropy_threshold'"),
        ({"gate": "sometimes"}, "expected goodput, entropy, always, never"),
        ({"num_speculative_tokens": 0}, "expected 1..16"),
        ({"num_speculative_tokens": True}, "is a bool: expected int"),
        ({"entropy_threshold": -1.0}, "expected a number of nats above 0"),
        ({"entropy_threshold": float("nan")}, "expected a number of nats above 0"),
        ({"model": 7}, "is a int: expected str or nothing"),
        ({"check_base": "no"}, "is a str: expected bool"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse({"method": "cerberus", **settings})


@pytest.mark.parametrize("value", [7, None, ["cerberus"]])
def test_what_is_no_config_is_refused(value):
    with pytest.raises(ConfigError, match="expected a method name or a mapping"):
        parse(value)


EVERY_KEY_OF_FREE = {
    "method": "free",
    "model": "EXIT",
    "exit_layer": 3,
    "num_speculative_tokens": 5,
    "mode": "exit",
    "gate": "quality",
    "threshold": 0.5,
    "exit_quality": 0.9,
    "rollback": 4.0,
    "max_updates": 300,
    "min_observations": 0,
    "decay": 1.0,
    "run_ahead": False,
    "check_base": False,
}


def test_a_config_of_free_survives_json():
    config = parse(EVERY_KEY_OF_FREE)
    assert set(config.to_dict()) == set(EVERY_KEY_OF_FREE)
    assert parse(json.loads(json.dumps(config.to_dict()))) == config


def test_free_by_name_mapping_and_engine_args_is_one_config():
    assert parse("free") == parse({"method": "free"}) == FreeConfig()
    assert parse(engine_args("free")["speculative_config"]) == FreeConfig()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"exit_leyer": 3}, "for method 'free'.*did you mean 'exit_layer'"),
        ({"exit_layer": 0}, "expected at least 1"),
        ({"exit_layer": "3"}, "free.exit_layer='3' is a str: expected int or nothing"),
        ({"mode": "fast"}, "is not a mode: expected verify or exit"),
        ({"mode": "exit", "gate": "goodput"}, "weighs speed alone"),
        ({"gate": "entropy"}, "free.gate='entropy' is not a gate: expected"),
        ({"gate": "goodput", "threshold": 0.5}, "free.threshold=0.5 has no effect with"),
        ({"rollback": 3.0}, "free.rollback=3.0 has no effect.*: expected mode 'exit'"),
        ({"exit_quality": 0.9}, "free.exit_quality=0.9 has no effect"),
        (
            {"mode": "exit", "gate": "always", "exit_quality": 0.9},
            "no effect with mode 'exit' and gate 'always': expected mode 'exit' and gate",
        ),
        ({"gate": "quality"}, "free.gate='quality' steers.*expected mode 'exit'"),
        ({"decay": 0.9}, "free.decay=0.9 has no effect.*: expected gate 'beta_mixture'"),
        ({"gate": "beta_mixture", "decay": 1.5}, "free.decay=1.5 is out of range"),
        ({"gate": "beta_mixture", "max_updates": -1}, "free.max_updates=-1 is out of"),
        ({"min_observations": -1}, "free.min_observations=-1 is out of range"),
        ({"threshold": 1.5}, r"expected 0\.\.1"),
        ({"exit_quality": 1.0}, "above 0 and below 1"),
        ({"exit_quality": float("nan")}, "above 0 and below 1"),
        ({"threshold": float("nan")}, r"expected 0\.\.1"),
        ({"num_speculative_tokens": 17}, r"expected 1\.\.16.*leave it out for 8"),
        ({"entropy_threshold": 1.0}, "Unknown key"),
    ],
)
def test_a_bad_setting_of_free_is_named_with_what_is_allowed(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse({"method": "free", **settings})


def test_lazyllm_says_where_it_is_switched_on():
    with pytest.raises(ConfigError, match="use --additional-config"):
        parse("lazyllm")


@pytest.mark.parametrize(
    ("settings", "gate"),
    [
        ({}, "goodput"),
        ({"threshold": 0.5}, "threshold"),
        ({"mode": "exit"}, "quality"),
        ({"mode": "exit", "threshold": 0.5}, "threshold"),
        ({"mode": "exit", "gate": "quality", "threshold": 0.5}, "quality"),
        ({"gate": "beta_mixture", "max_updates": None, "decay": 0.9}, "beta_mixture"),
    ],
)
def test_the_gate_of_free_that_settings_mean(settings, gate):
    assert parse({"method": "free", **settings}).gate_in_use == gate
