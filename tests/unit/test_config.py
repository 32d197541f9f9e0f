import dataclasses
import json

import pytest

from vllm_accel import ConfigError, engine_args
from vllm_accel.config import CerberusConfig, parse

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


@pytest.mark.parametrize("method", ["free"])
def test_a_planned_method_is_refused_naming_what_exists(method):
    with pytest.raises(ConfigError, match=r"not in this version: expected cerberus"):
        parse(method)


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


def test_lazyllm_says_where_it_is_switched_on():
    with pytest.raises(ConfigError, match="use --additional-config"):
        parse("lazyllm")
