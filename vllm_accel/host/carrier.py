"""How our config travels: `additional_config["vllm_accel"]`, as plain JSON values.

vLLM pickles it to every process and hashes it into the compile-cache key.
"""

from typing import Any

from vllm.config import VllmConfig

from vllm_accel.config import Config, parse

KEY = "vllm_accel"


def loaded(additional_config: dict[str, Any] | None, config: Config) -> dict:
    """The user's additional config with ours put in."""
    return {**(additional_config or {}), KEY: config.to_dict()}


def is_loaded(vllm_config: VllmConfig) -> bool:
    """Whether an engine is ours."""
    return KEY in vllm_config.additional_config


def unloaded(vllm_config: VllmConfig) -> Config:
    """Our config, in whichever process this is."""
    return parse(vllm_config.additional_config[KEY])
