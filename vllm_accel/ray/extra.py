"""The extra `ray`: what it brings, and what to say when it is not there."""

import importlib.util
import os
from importlib.metadata import version

from vllm_accel.errors import AccelError, UnsupportedHost

SUPPORTED = "2.60"
NEEDED = ("ray", "pyarrow", "pandas")


def require() -> None:
    """Refuses to go on without the extra, or with a Ray nobody tested.

    Raises:
        AccelError: a package of the extra is not installed.
        UnsupportedHost: this Ray is another minor version.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise AccelError(
                f"Replicas on Ray need {name}, which is not installed: expected the ray "
                "extra; run pip install '.[ray]' in a clone of vllm-accel (not ray[llm], "
                "which brings another vLLM)."
            )
    found = version("ray")
    minor = ".".join(found.split(".")[:2])
    if minor != SUPPORTED and os.environ.get("VLLM_ACCEL_ANY_RAY") != "1":
        raise UnsupportedHost(
            f"vllm_accel is tested with Ray {SUPPORTED}, found {found}: expected "
            f"{SUPPORTED}.*; install that, or set VLLM_ACCEL_ANY_RAY=1 to try."
        )
