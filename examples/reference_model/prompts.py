"""Held-out prompts: pieces of packages that neither base nor heads were trained on.

python prompts.py code > prompts/code.jsonl; python prompts.py prose > prompts/prose.jsonl
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from corpus import HELD_OUT, TRAINING

CODE_FILES = 12
CODE_LINES = 24
PROSE_PACKAGES = (
    "attrs", "cachetools", "h11", "httpx", "multidict", "requests", "starlette",
    "supervisor", "tqdm", "urllib3", "watchfiles", "websockets", "yarl",
)  # fmt: skip
PROSE_PIECES = 5
PROSE_LINES = 16
ROOT = Path(sysconfig.get_paths()["purelib"])


def code() -> Iterator[tuple[str, str]]:
    """(file, the lines after a third of it) of each package's longest files."""
    for package in HELD_OUT:
        files = sorted(ROOT.glob(f"{package}/**/*.py"), key=lambda f: -f.stat().st_size)
        for file in files[:CODE_FILES]:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            yield _name(file), _piece(lines, len(lines) // 3, CODE_LINES)


def prose() -> Iterator[tuple[str, str]]:
    """(file, lines from several places) of each package's own description."""
    for package in PROSE_PACKAGES:
        assert package not in TRAINING
        (file,) = ROOT.glob(f"{package}-*.dist-info/METADATA")
        _, _, text = file.read_text(encoding="utf-8").partition("\n\n")
        lines = text.splitlines(keepends=True)
        for i in range(PROSE_PIECES):
            first = len(lines) * i // PROSE_PIECES
            yield f"{_name(file)}:{first}", _piece(lines, first, PROSE_LINES)


def _piece(lines: list[str], first: int, count: int) -> str:
    return "".join(lines[first : first + count])


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    for source, prompt in {"code": code, "prose": prose}[sys.argv[1]]():
        if len(prompt) > 200:
            print(json.dumps({"source": source, "prompt": prompt}))
