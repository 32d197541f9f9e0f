"""The entry point vLLM calls in each of its processes.

Installed but off, this is all there is: a permission for AMX tiles and the door, which
lets our method names reach us. `VLLM_ACCEL_DISABLE=1` removes the door too.
"""

import logging
import os


def register() -> None:
    """Opens the door; called once per process by vLLM, harmless when called again."""
    if os.environ.get("VLLM_ACCEL_DISABLE") == "1":
        return
    try:
        from vllm_accel.host import door

        door.open_door()
    except (ImportError, AttributeError) as error:
        # A vLLM whose door we do not know must start all the same: we may not be wanted.
        logging.getLogger("vllm.vllm_accel").warning(
            "vllm_accel cannot attach to this vLLM and stays off: %s", error
        )
