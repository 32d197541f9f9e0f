"""Hook on `EngineCore.post_step`: no second trip to the worker for the drafts.

With any synchronous speculative method vLLM asks the worker for its drafts after every
step, a round trip plain decoding does not have, also when there are none. Our drafts
come with the step's output; engines that are not ours keep the original.
"""

from functools import wraps

from vllm.v1.engine.core import EngineCore

from vllm_accel.host import carrier


def apply() -> None:
    """Wraps `EngineCore.post_step` once."""
    original = EngineCore.post_step
    if hasattr(original, "vllm_accel_original"):
        return

    @wraps(original)
    def post_step(self: EngineCore, model_executed: bool) -> None:
        if not carrier.is_loaded(self.vllm_config):
            original(self, model_executed)

    post_step.vllm_accel_original = original
    EngineCore.post_step = post_step


def remove() -> None:
    """Puts the original back."""
    original = getattr(EngineCore.post_step, "vllm_accel_original", None)
    if original is not None:
        EngineCore.post_step = original
