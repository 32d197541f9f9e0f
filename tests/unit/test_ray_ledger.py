"""patches/ray.toml tells the truth about the installed Ray and about our code."""

import ast
import importlib.util
import re

import ledger  # patches/ is on pytest's path
import ledger_laws
import pytest
from ledger_laws import ROOT

from vllm_accel.ray import extra

OURS = ROOT / "vllm_accel" / "ray"
FILE = ROOT / "patches" / "ray.toml"
TOUCHES = ledger.load(FILE)

installed = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


@installed
@pytest.mark.parametrize("touch", TOUCHES, ids=ledger_laws.by_id)
def test_the_target_is_as_it_was_when_we_read_it(touch):
    ledger_laws.check_target(touch)


@installed
def test_check_passes(capsys):
    ledger_laws.check_passes(FILE, TOUCHES, capsys)


@pytest.mark.parametrize("touch", TOUCHES, ids=ledger_laws.by_id)
def test_our_side_of_a_touch_exists(touch):
    ledger_laws.check_our_side(touch)


def test_every_entry_says_what_it_must():
    kinds = {"RO": "override", "RS": "seam"}
    processes = ("main", "ingress", "replica", "batch", "every")
    ledger_laws.check_entries(TOUCHES, kinds, processes)
    for touch in TOUCHES:
        ray = touch.target.startswith("ray.")
        assert touch.versions == (extra.SUPPORTED if ray else "0.32")


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
