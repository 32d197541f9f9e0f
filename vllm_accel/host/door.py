"""What is there before anyone switches us on."""

import torch

from vllm_accel.host.hooks import cli_names, speculative_config


def open_door() -> None:
    """Applies the two hooks and the AMX permission; calling it again changes nothing."""
    if torch.cpu._is_amx_tile_supported():
        # Without it vLLM's bf16 attention kernel dies of SIGILL on AMX machines.
        torch.cpu._init_amx()
    cli_names.apply()
    speculative_config.apply()


def close_door() -> None:
    """Removes both hooks: vLLM's own attributes are back."""
    cli_names.remove()
    speculative_config.remove()
