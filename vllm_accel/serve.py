"""`vllm-accel serve`: vLLM's own `vllm serve`, with the libraries it wants preloaded.

LD_PRELOAD is read when a process starts, so this one is replaced by vLLM's.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from vllm_accel import preload
from vllm_accel.errors import UnsupportedHost


def serve(arguments: Sequence[str]) -> NoReturn:
    """Becomes `vllm serve ARGUMENTS`.

    Raises:
        UnsupportedHost: there is no `vllm` command, or it would not start.
    """
    command = _vllm_command()
    sys.stdout.flush()
    environment = with_preloads(os.environ)
    os.execvpe(command, [command, "serve", *arguments], environment)


def with_preloads(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of the environment whose LD_PRELOAD has what this machine offers."""
    libiomp5 = preload.find_libiomp5() if preload.is_cpu_build() else None
    preloaded = preload.extended(
        environment.get("LD_PRELOAD", ""),
        libiomp5=libiomp5,
        tcmalloc=preload.find_tcmalloc(),
    )
    return {**environment, "LD_PRELOAD": preloaded} if preloaded else {**environment}


def _vllm_command() -> str:
    beside_python = Path(sys.executable).with_name("vllm")
    command = str(beside_python) if beside_python.is_file() else shutil.which("vllm")
    if command is None:
        raise UnsupportedHost(
            f"No `vllm` command beside {sys.executable} or on PATH: expected vLLM in "
            "this environment; run `vllm-accel doctor` to see how to install it."
        )
    if preload.installed_version("vllm") is None:
        raise UnsupportedHost(
            "No distribution is named 'vllm', so `vllm serve` would die of "
            "PackageNotFoundError: expected one; run `vllm-accel doctor --fix`, which "
            "adds its metadata."
        )
    return command
