"""vLLM plugin: Cerberus, FREE and LazyLLM; off changes nothing."""

from importlib.metadata import version

from vllm_accel.config import CerberusConfig, engine_args
from vllm_accel.errors import AccelError, CheckpointError, ConfigError, UnsupportedHost

__version__ = version("vllm-accel")

__all__ = [
    "AccelError",
    "CerberusConfig",
    "CheckpointError",
    "ConfigError",
    "UnsupportedHost",
    "engine_args",
]
