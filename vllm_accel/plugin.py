"""The entry point vLLM calls in each of its processes.

Installed but off, this is all there is: a permission for AMX tiles and the door, which
lets our method names reach us. `VLLM_ACCEL_DISABLE=1` removes the door too.
"""

import os


def register() -> None:
    """Opens the door; called once per process by vLLM, harmless when called again."""
    if os.environ.get("VLLM_ACCEL_DISABLE") == "1":
        return
    from vllm_accel.host import door

    door.open_door()
