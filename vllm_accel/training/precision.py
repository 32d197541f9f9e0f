"""Which float type this machine multiplies fastest, and which weights are saved in."""

import torch
from torch import nn

SAVED_DTYPE = torch.bfloat16
"""Of heads, exits and models as they are saved."""


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor knows it, else float32.

    A CPU that has to imitate bfloat16 takes five times as long for it.
    """
    on_gpu = torch.cuda.is_available()
    knows = torch.cuda.is_bf16_supported(False) if on_gpu else cpu_knows_bfloat16()
    return torch.bfloat16 if knows else torch.float32


def cpu_knows_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    abilities = torch.cpu.get_capabilities()
    return any(has for name, has in abilities.items() if "bf16" in name)


def round_as_saved(module: nn.Module) -> None:
    """Rounds parameters, to be of `fast_dtype`: figures are to be of what is saved.

    Buffers stay as they are: RoPE's tables are not saved.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(SAVED_DTYPE).to(fast_dtype())
