"""What vLLM says of itself, for `vllm-accel doctor`.

Imported in a process of its own only: an import that fails, or dies, is a finding.
"""

from typing import Any

import torch
import vllm
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.triton_utils import HAS_TRITON

from vllm_accel.errors import UnsupportedHost
from vllm_accel.host import compat


def facts() -> dict[str, Any]:
    """Plain JSON values; the keys are the fields of `vllm_accel.doctor.VllmFacts`."""
    load_general_plugins()
    return {
        "version": vllm.__version__,
        "supported": compat.SUPPORTED,
        "refusal": _refusal(),
        "platform": current_platform.device_type,
        "asked_for_v2": bool(envs.VLLM_USE_V2_MODEL_RUNNER),
        "plain_runs_v2": _plain_runs_v2(),
        "door_is_open": hasattr(EngineArgs.add_cli_args, "vllm_accel_original"),
        "amx_permitted": _amx_permitted(),
    }


def _refusal() -> str | None:
    try:
        compat.check_version()
    except UnsupportedHost as error:
        return str(error)
    return None


def _plain_runs_v2() -> bool:
    """Whatever the model (vllm/config/vllm.py:VllmConfig.use_v2_model_runner, 0.32)."""
    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if asked is None else bool(asked)


def _amx_permitted() -> bool | None:
    """None on machines without AMX tiles."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    return bool(torch.cpu._init_amx())
