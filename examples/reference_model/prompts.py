"""Held-out prompts: pieces of packages that neither base nor heads were trained on.

python prompts.py > prompts/code.jsonl
"""

import json
import sysconfig
from pathlib import Path

PACKAGES = ("cachetools", "httpx", "requests", "starlette", "tqdm", "urllib3")
PER_PACKAGE = 6
LINES = 24


def pieces(package: str):
    """The first lines after a third of each of the package's longest files."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted(root.glob(f"{package}/**/*.py"), key=lambda f: (-f.stat().st_size, f))
    for file in files[:PER_PACKAGE]:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        first = len(lines) // 3
        prompt = "".join(lines[first : first + LINES])
        yield {"source": file.relative_to(root).as_posix(), "prompt": prompt}


if __name__ == "__main__":
    for package in PACKAGES:
        for piece in pieces(package):
            print(json.dumps(piece))
