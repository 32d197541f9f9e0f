"""patches/ray.toml tells the truth about the installed Ray and about our code."""

import ast
import importlib.util
import re
from pathlib import Path

import ledger  # patches/ is on pytest's path
import pytest

from vllm_accel.ray import extra

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "vllm_accel" / "ray"
FILE = ROOT / "patches" / "ray.toml"
TOUCHES = ledger.load(FILE)

installed = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


def by_id(value):
    return getattr(value, "id", None)


@installed
@pytest.mark.parametrize("touch", TOUCHES, ids=by_id)
def test_the_target_is_as_it_was_when_we_read_it(touch):
    assert ledger.fingerprint(touch.target) == touch.fingerprint, touch.why


@installed
def test_check_passes(capsys):
    assert ledger.check(FILE) == 0
    assert f"{len(TOUCHES)} touches, 0 not as written" in capsys.readouterr().out


@pytest.mark.parametrize("touch", TOUCHES, ids=by_id)
def test_our_side_of_a_touch_exists(touch):
    file, _, symbol = touch.where.partition(":")
    assert ledger.defined_in(ROOT / file, symbol)


def test_every_entry_says_what_it_must():
    ids = [touch.id for touch in TOUCHES]
    assert len(set(ids)) == len(ids)
    for touch in TOUCHES:
        assert touch.kind == {"RO": "override", "RS": "seam"}[touch.id[:2]]
        assert touch.process in ("main", "ingress", "replica", "batch", "every")
        ray = touch.target.startswith("ray.")
        assert touch.versions == (extra.SUPPORTED if ray else "0.32")
        assert touch.why
        assert touch.remove_when


def test_the_extra_pins_what_was_read():
    assert f"ray[serve]=={extra.SUPPORTED}." in (ROOT / "pyproject.toml").read_text()


def methods(file, name):
    (cls,) = ledger.defined_in(OURS / file, name)
    return [n.name for n in cls.body if isinstance(n, ast.AsyncFunctionDef)]


@pytest.mark.parametrize(
    ("file", "name"), [("server.py", "FastFailServer"), ("ingress.py", "RetryingIngress")]
)
def test_an_overridden_method_has_an_entry(file, name):
    where = {touch.where for touch in TOUCHES if touch.kind == "override"}
    for method in methods(file, name):
        ours = f"vllm_accel/ray/{file}:{name}.{method}"
        assert method.startswith("_") or ours in where


@pytest.mark.parametrize("file", sorted(OURS.glob("*.py")), ids=lambda file: file.stem)
def test_private_names_of_ray_have_an_entry(file):
    """Keyword arguments and attributes that begin with an underscore and are not ours."""
    known = {"_metrics_export_port"}  # RO01
    tree = ast.parse(file.read_text())
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            assert node.arg in known
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            owner = ast.unparse(node.value)
            assert owner in ("self", "os", "argparse") or node.attr in defined, node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray"):
            assert "._" not in node.module
