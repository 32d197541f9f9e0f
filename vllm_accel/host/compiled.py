"""Functions of ours, compiled as vLLM compiles the model."""

from collections.abc import Callable
from typing import TypeVar

import torch
from vllm.config import CompilationMode, VllmConfig

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F, vllm_config: VllmConfig) -> F:
    """With the model's backend and options; itself where the model runs eagerly.

    On CPU only: nobody has measured what it gives on a GPU, where vLLM compiles pieces
    and captures graphs.
    """
    config = vllm_config.compilation_config
    if (
        config.mode == CompilationMode.NONE
        or vllm_config.device_config.device_type != "cpu"
    ):
        return function
    inductor = config.backend == "inductor"
    options = dict(config.inductor_compile_config) if inductor else None
    return torch.compile(function, dynamic=True, backend=config.backend, options=options)
