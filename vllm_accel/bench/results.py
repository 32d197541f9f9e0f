"""The file a bench writes: on what machine, with what, and a row per measurement."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vllm_accel.errors import ConfigError
from vllm_accel.training.precision import cpu_knows_bfloat16

Row = dict[str, Any]
Document = dict[str, Any]

_KEYS = {"machine", "versions", "command", "date", "rows"}


def document(command: Sequence[str], device: str) -> Document:
    """A file without rows yet.

    Args:
        command: as typed.
        device: what the model runs on: `cpu`, or the accelerator's name.
    """
    return {
        "machine": machine() | {"device": device},
        "versions": versions(),
        "command": list(command),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "rows": [],
    }


def machine() -> dict[str, Any]:
    """CPU model and best vector instructions, cores this process may use, memory in GiB,
    platform."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * page_size / 2**30, 1),
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    """As Linux names it; elsewhere, and on Arm, what Python knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions() -> str:
    """The best the CPU has, as torch names them: long prompts live by these."""
    best: str = torch.backends.cpu.get_cpu_capability()
    return f"{best}, bf16" if cpu_knows_bfloat16() else best


def versions() -> dict[str, str | None]:
    """Of what was measured; None for what has no metadata."""
    return {
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "vllm_accel": _version("vllm-accel"),
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and most of the rounds."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def write(file: Path, content: Document) -> None:
    """Writes the whole file or nothing: a stop leaves what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def load(file: Path) -> Document:
    """A file that a bench wrote.

    Raises:
        ConfigError: it cannot be read, is no such file, or has no rows.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): expected what `vllm-accel bench` wrote "
            "with --output; check its path."
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS or not content["rows"]:
        raise ConfigError(
            f"{file} lacks keys or rows: expected {', '.join(sorted(_KEYS))}, as "
            "`vllm-accel bench` writes with --output; run it again."
        )
    return content


def is_prefill(content: Document) -> bool:
    """Whether the rows are those of `bench prefill`."""
    return "ttft_ms" in content["rows"][0]


def command_line() -> list[str]:
    """This process's command, as typed."""
    return ["vllm-accel", *sys.argv[1:]]
