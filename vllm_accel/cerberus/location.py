"""Moved to `vllm_accel.on_disk.location`."""

from functools import partial

from vllm_accel.on_disk.location import method_folder, model_folder

heads_folder = partial(method_folder, "cerberus")

__all__ = ["heads_folder", "model_folder"]
