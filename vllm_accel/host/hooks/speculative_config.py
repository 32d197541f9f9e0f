"""Hook on `EngineArgs.create_speculative_config`: where a method is switched on.

It is the one place every way in passes (command line, `LLM`, async engine, Ray) while
the model's config is known and the engine's is not built yet.
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import wraps
from typing import Any

from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_accel.config import is_ours, methods_with
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
            pruned = "lazyllm" in as_mapping(self.additional_config)
            if pruned:
                from vllm_accel.host import lazyllm

                method = None if settings is None else settings["method"]
                lazyllm.switch_on(self, target_model_config, target_parallel_config, method)
            if settings is None:
                return original(self, target_model_config, target_parallel_config)
            from vllm_accel.host import assemble

            return assemble.switch_on(
                self,
                target_model_config,
                target_parallel_config,
                settings,
                original,
                pruned=pruned,
            )
        except AccelError as error:
            if cli_names.used_by_command_line:
                _end_with_one_line(error)
            raise

    create_speculative_config.vllm_accel_original = original
    EngineArgs.create_speculative_config = create_speculative_config


def _refuse_our_keys(method: Any, settings: dict[str, Any]) -> None:
    """Says what is missing when our settings come without our method's name."""
    vllm_s = {field.name for field in dataclasses.fields(SpeculativeConfig)}
    ours = [key for key in sorted(settings.keys() - vllm_s) if methods_with(key)]
    if ours and method is None:
        methods = methods_with(ours[0])
        raise ConfigError(
            f"{ours[0]!r} is a setting of vllm_accel's {' and '.join(methods)} but no "
            f"method is named: expected 'method': {methods[0]!r} beside it; on the command "
            f"line add --speculative-config.method {methods[0]}."
        )


def _end_with_one_line(error: AccelError) -> None:
    """Lets `error`, when nobody catches it, end the command without a traceback."""
    otherwise = sys.excepthook

    def excepthook(kind: Any, raised: Any, traceback: Any) -> None:
        if raised is not error:
            return otherwise(kind, raised, traceback)
        sys.stderr.write(f"vllm: error: {error}\n")
        raise SystemExit(2)

    sys.excepthook = excepthook


def as_mapping(additional_config: Any) -> Mapping[str, Any]:
    """What stands in `additional_config`; vLLM allows other things than mappings."""
    return additional_config if isinstance(additional_config, Mapping) else {}


def remove() -> None:
    """Puts the original back."""
    wrapped = EngineArgs.create_speculative_config
    original = getattr(wrapped, "vllm_accel_original", None)
    if original is not None:
        EngineArgs.create_speculative_config = original


def requested(engine_args: EngineArgs) -> dict[str, Any] | None:
    """What the user asked of us, all spellings merged; None when it is not for us."""
    config = engine_args.speculative_config
    if config is not None and not isinstance(config, str | Mapping):
        return None  # vLLM has its own words for that
    flags = {
        key: value
        for key, attribute in _FLAGS.items()
        if (value := getattr(engine_args, attribute, None)) is not None
    }
    settings = {"method": config} if isinstance(config, str) else dict(config or {})
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    method = settings.get("method", flags.get("method"))
    if not is_ours(method):
        _refuse_our_keys(method, settings)
        return None
    for key in settings.keys() & flags.keys():
        raise ConfigError(
            f"{key!r} is given twice, as --{_FLAGS[key].replace('_', '-')} and in "
            "--speculative-config: expected it once; drop one of them."
        )
    return settings | flags
