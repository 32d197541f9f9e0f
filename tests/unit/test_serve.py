"""What `vllm-accel serve` starts, and with which libraries."""

import os
import subprocess
import sys

import pytest

from vllm_accel import mend, preload

OPENMP, TCMALLOC = "/venv/lib/libiomp5.so", "/lib/libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", f"{OPENMP}:{TCMALLOC}"),
        ("/mine.so", f"/mine.so:{OPENMP}:{TCMALLOC}"),
        ("/a.so /b.so", f"/a.so:/b.so:{OPENMP}:{TCMALLOC}"),
        ("/mine/libiomp5.so", f"/mine/libiomp5.so:{TCMALLOC}"),
        ("/mine/libgomp.so.1", f"/mine/libgomp.so.1:{TCMALLOC}"),
        ("/mine/libjemalloc.so.2", f"/mine/libjemalloc.so.2:{OPENMP}"),
        (f"{TCMALLOC}:{OPENMP}", f"{TCMALLOC}:{OPENMP}"),
    ],
)
def test_preloads_are_added_behind_the_users_own(given, expected):
    assert preload.extended(given, libiomp5=OPENMP, tcmalloc=TCMALLOC) == expected


def test_what_is_not_found_is_not_preloaded():
    assert preload.extended("/mine.so", libiomp5=None, tcmalloc=None) == "/mine.so"
    assert preload.extended("", libiomp5=None, tcmalloc=TCMALLOC) == TCMALLOC


def test_extending_twice_is_extending_once():
    once = preload.extended("/mine.so", libiomp5=OPENMP, tcmalloc=TCMALLOC)
    assert preload.extended(once, libiomp5=OPENMP, tcmalloc=TCMALLOC) == once


@pytest.fixture
def start(tmp_path):
    """Runs `vllm-accel` where `vllm` is a script that says how it was started."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "vllm"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "LD_PRELOAD=$LD_PRELOAD" "$@"\nexit 7\n')
    command.chmod(0o755)
    mend.write_distribution(tmp_path, "0.32.0")

    def run(*arguments, python=tmp_path / "bin" / "python", **environment):
        code = f"import sys; sys.executable = {str(python)!r}\n"
        code += "from vllm_accel.cli import main; sys.exit(main())"
        inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=inherited | {"PYTHONPATH": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
        )

    return run


def test_serve_becomes_vllm_serve_with_every_argument(start):
    done = start("serve", "MODEL", "--speculative-config", "cerberus", "--help")
    said = done.stdout.splitlines()
    assert said[1:] == ["serve", "MODEL", "--speculative-config", "cerberus", "--help"]
    assert done.returncode == 7


def test_serve_preloads_what_this_machine_has(start):
    expected = preload.extended(
        "libmine.so",
        libiomp5=preload.find_libiomp5(),
        tcmalloc=preload.find_tcmalloc(),
    )
    done = start("serve", LD_PRELOAD="libmine.so")
    assert done.stdout.splitlines()[0] == f"LD_PRELOAD={expected}"


def test_without_a_vllm_command_serve_ends_in_one_line(start, tmp_path):
    done = start("serve", "MODEL", python=tmp_path / "none" / "python", PATH="")
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-accel: error: No `vllm` command")
    assert done.stderr.count("\n") == 1
