"""Which float type this machine multiplies fastest."""

import torch


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor knows it, else float32.

    A CPU that has to imitate bfloat16 takes five times as long for it.
    """
    if torch.cuda.is_available():
        knows = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities().items()
        knows = any(has for name, has in abilities if "bf16" in name)
    return torch.bfloat16 if knows else torch.float32
