"""The ledger: every touch of vLLM as data, checked against the installed source.

    python patches/ledger.py check [FILE]          a table; exit status 1 on drift
    python patches/ledger.py fingerprint TARGET    what to write into ledger.toml

Sources are read, never imported: a check takes seconds and starts nothing of vLLM.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
_parsed = cache(ast.parse)


class LedgerError(Exception):
    """A target does not exist in the installed source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """One table of `ledger.toml`; README.md says what the fields mean."""

    id: str
    kind: str
    target: str
    fingerprint: str
    versions: str
    process: str
    where: str
    why: str
    diff: str
    remove_when: str


def load(file: Path = HERE / "ledger.toml") -> list[Touch]:
    """Every touch, in the order of the file."""
    tables = tomllib.loads(file.read_text())["touch"]
    return [Touch(**table) for table in tables]


def source_file(module: str) -> Path:
    """The installed file of a module, found without importing it.

    Raises:
        LedgerError: there is no such module.
    """
    package, *rest = module.split(".")
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        base = Path(folder, *rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    raise LedgerError(f"no module {module}")


def definitions(target: str) -> list[ast.AST]:
    """What defines a target, `module:name` or `module:Class.name`.

    Raises:
        LedgerError: the installed source has no such name.
    """
    module, _, path = target.partition(":")
    found = defined_in(source_file(module), path)
    if not found:
        raise LedgerError(f"no {path} in {module}")
    return found


def defined_in(file: Path, path: str) -> list[ast.AST]:
    """The statements of a file that define `name` or `Class.name`.

    A name that a class body does not define is looked for as `self.name = ...` in the
    methods of the class. Importing a name defines it.
    """
    scope: ast.AST = _parsed(file.read_text())
    *outer, name = path.split(".")
    for class_name in outer:
        scope = next(iter(_defining(scope, class_name)), ast.Module([], []))
    found = _defining(scope, name)
    if outer and not found:
        found = [node for node in ast.walk(scope) if f"self.{name}" in _assigned(node)]
    return found


def source(target: str) -> str:
    """A target's code in one uniform format, without comments."""
    return "\n".join(ast.unparse(node) for node in definitions(target))


def fingerprint(target: str) -> str:
    """16 hex digits that change with a target's code, not with its documentation."""
    return hashlib.sha256(_dump(definitions(target)).encode()).hexdigest()[:16]


def apply(diff: Path, folder: Path) -> str:
    """Applies a diff to copies of installed files in a folder; gives git's refusal."""
    for name in re.findall(r"^--- a/(\S+)$", diff.read_text(), re.MULTILINE):
        module = name.removesuffix(".py").replace("/", ".")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_file(module), folder / name)
    # Inside a repository git would silently skip paths that are not the repository's.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    git = ["git", "apply", str(diff.resolve())]
    done = subprocess.run(git, cwd=folder, env=env, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def complaint(touch: Touch) -> str:
    """What is wrong with a touch; nothing when it is as written."""
    try:
        found = fingerprint(touch.target)
        if found != touch.fingerprint:
            return f"changed, now {found}"
        with tempfile.TemporaryDirectory() as folder:
            return apply(HERE / touch.diff, Path(folder)) if touch.diff else ""
    except LedgerError as error:
        return str(error)


def check(file: Path = HERE / "ledger.toml") -> int:
    """Prints a line per touch; gives 1 if any is not as written, otherwise 0."""
    complaints = {touch: complaint(touch) for touch in load(file)}
    for touch, wrong in complaints.items():
        print(f"{touch.id:4} {touch.kind:9} {wrong or 'ok':26} {touch.target}")
    drifted = sum(map(bool, complaints.values()))
    print(f"{len(complaints)} touches, {drifted} not as written")
    return min(drifted, 1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="The ledger of every touch of vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="compare touches with what is installed")
    checks.add_argument(
        "file", nargs="?", type=Path, default=HERE / "ledger.toml", help="or ray.toml"
    )
    fingerprints = commands.add_parser("fingerprint", help="print that of a target")
    fingerprints.add_argument("target", help="module:name or module:Class.name")
    options = parser.parse_args()
    if options.command == "check":
        return check(options.file)
    print(fingerprint(options.target))
    return 0


def _defining(scope: ast.AST, name: str) -> list[ast.AST]:
    """Statements of a scope that define a name, those under `if` and `try` too."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.If | ast.Try):
            found += _defining(node, name)
        elif name in (getattr(node, "name", None), *_assigned(node)):
            found.append(node)
    return found


def _assigned(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [ast.unparse(target) for target in targets]


def _dump(value: object) -> str:
    """Like `ast.dump`, less docstrings and what Python versions write differently."""
    if isinstance(value, list):
        items = [_dump(item) for item in value if not _is_docstring(item)]
        return f"[{', '.join(items)}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [(name, v) for name, v in ast.iter_fields(value) if v not in (None, [])]
    inside = ", ".join(f"{name}={_dump(v)}" for name, v in fields)
    return f"{type(value).__name__}({inside})"


def _is_docstring(node: object) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


if __name__ == "__main__":
    sys.exit(main())
