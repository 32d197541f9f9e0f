"""The built wheel works outside the clone."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOOK = """
from importlib.metadata import entry_points, version
import vllm_accel, sys
from vllm_accel.config import parse
plugins = entry_points(group="vllm.general_plugins", name="vllm_accel")
(plugin,) = plugins
assert version("vllm-accel") == vllm_accel.__version__
assert "site-packages" in vllm_accel.__file__, vllm_accel.__file__
assert parse("cerberus").gate == "goodput"
assert callable(plugin.load())
"""


def run(*command, cwd):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_everything(tmp_path):
    source = tmp_path / "source"  # a copy: building leaves its traces beside the code
    shutil.copytree(ROOT / "vllm_accel", source / "vllm_accel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    # Torch and vLLM come from this environment, our package from the wheel alone.
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "-q", wheel, cwd=tmp_path)
    run(python, "-c", LOOK, cwd=tmp_path)
    help_text = run(tmp_path / "venv" / "bin" / "vllm-accel", "--help", cwd=tmp_path)
    assert "train" in help_text
    packed = subprocess.run(
        [python, "-m", "zipfile", "-l", wheel],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    modules = sorted(
        p.relative_to(ROOT).as_posix() for p in ROOT.glob("vllm_accel/**/*.py")
    )
    assert [m for m in modules if m not in packed] == []
    assert "LICENSE" in packed
    assert "vllm_accel/bench/report.html.jinja" in packed
