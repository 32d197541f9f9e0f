"""The one version check: which vLLM this release is written for and tested with."""

import os

import vllm

from vllm_accel.errors import UnsupportedHost

SUPPORTED = "0.32"


def check_version() -> None:
    """Refuses any other vLLM minor; only ever called when a method is switched on.

    Raises:
        UnsupportedHost: the installed vLLM is another minor version.
    """
    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor != SUPPORTED and os.environ.get("VLLM_ACCEL_ANY_VLLM") != "1":
        raise UnsupportedHost(
            f"vllm_accel is tested with vLLM {SUPPORTED}, found {vllm.__version__}: "
            f"expected {SUPPORTED}.*; install that, or set VLLM_ACCEL_ANY_VLLM=1 to try."
        )
