"""Moved to `vllm_accel.on_disk.base_model`."""

from vllm_accel.on_disk.base_model import fingerprint, lm_head_weight

__all__ = ["fingerprint", "lm_head_weight"]
