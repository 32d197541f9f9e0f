"""Our part of Model Runner V1 put on a runner that vLLM has made."""

from typing import Any

from vllm_accel.host import carrier
from vllm_accel.host.v1.free_runner import FreeRunnerMixin
from vllm_accel.host.v1.runner import CerberusRunnerMixin

_MIXINS = {"cerberus": CerberusRunnerMixin, "free": FreeRunnerMixin}


def dress(runner: Any) -> None:
    """Gives one runner our overrides, whatever class the device's worker made it of."""
    method = carrier.unloaded(runner.vllm_config).method
    runner.__class__ = type(
        f"{method.capitalize()}{type(runner).__name__}",
        (_MIXINS[method], type(runner)),
        {"__module__": __name__},
    )
    runner.start_drafting()
