"""Hook on `EngineArgs.create_speculative_config`: where a method is switched on.

It is the one place every way in passes (command line, `LLM`, async engine, Ray) while
the model's config is known and the engine's is not built yet.
"""

import sys
from functools import wraps
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_accel.config import is_ours
from vllm_accel.errors import AccelError, ConfigError
from vllm_accel.host.hooks import cli_names

_FLAGS = {
    "method": "spec_method",
    "model": "spec_model",
    "num_speculative_tokens": "spec_tokens",
}


def apply() -> None:
    """Wraps `EngineArgs.create_speculative_config` once."""
    original = EngineArgs.create_speculative_config
    if hasattr(original, "vllm_accel_original"):
        return

    @wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        try:
            settings = requested(self)
            if settings is None:
                return original(self, target_model_config, target_parallel_config)
            from vllm_accel.host import assemble

            return assemble.switch_on(
                self, target_model_config, target_parallel_config, settings, original
            )
        except AccelError as error:
            if cli_names.used_by_command_line:
                sys.stderr.write(f"vllm: error: {error}\n")
                sys.exit(2)
            raise

    create_speculative_config.vllm_accel_original = original
    EngineArgs.create_speculative_config = create_speculative_config


def remove() -> None:
    """Puts the original back."""
    wrapped = EngineArgs.create_speculative_config
    original = getattr(wrapped, "vllm_accel_original", None)
    if original is not None:
        EngineArgs.create_speculative_config = original


def requested(engine_args: EngineArgs) -> dict[str, Any] | None:
    """What the user asked of us, all spellings merged; None when it is not for us."""
    config = engine_args.speculative_config
    flags = {
        key: value
        for key, attribute in _FLAGS.items()
        if (value := getattr(engine_args, attribute)) is not None
    }
    settings = {"method": config} if isinstance(config, str) else dict(config or {})
    if not is_ours(settings.get("method", flags.get("method"))):
        return None
    for key in settings.keys() & flags.keys():
        raise ConfigError(
            f"{key!r} is given twice, as --{_FLAGS[key].replace('_', '-')} and in "
            "--speculative-config: expected it once; drop one of them."
        )
    return settings | flags
