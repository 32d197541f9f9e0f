"""Text of this installation -> token ids to train the reference model on.

Whole packages are held out. A held-out file that shares more than a fifth of its
13-grams with the training text is dropped. Writes OUT/{code,prose}.bin (uint16 ids to
train on), OUT/held_out.jsonl ({"package", "kind", "file", "text", "overlap"} a line) and
OUT/report.json.

    python corpus.py OUT --tokenizer weights
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

TRAINING = (
    "aiohttp", "anthropic", "click", "fastapi", "huggingface_hub", "jinja2", "mcp",
    "networkx", "numba", "numpy", "openai", "pydantic", "rich", "scipy", "setuptools",
    "sklearn", "sympy", "torch", "transformers", "vllm",
)  # fmt: skip
HELD_OUT = ("cachetools", "httpx", "requests", "starlette", "tqdm", "urllib3")
PROSE = {".md", ".rst", ".txt"}
GRAM = 13
MOST_OVERLAP = 0.2
END_OF_TEXT = 0
_SIZES = range(400, 200_000)
_HASH_BASE = np.uint64(1_099_511_628_211)


def training_files() -> Iterator[tuple[str, Path]]:
    """(kind, file) of the standard library and of every training package."""
    root = Path(sysconfig.get_paths()["purelib"])
    for package in TRAINING:
        yield from _package_files(root, package)
    for file in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"):
        if "site-packages" not in file.parts and not _is_held_out(file):
            yield "code", file


def _package_files(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    for file in sorted((root / package).rglob("*")):
        if file.suffix == ".py" and not _is_held_out(file.relative_to(root / package)):
            yield "code", file
        elif file.suffix in PROSE and "data" not in file.parts:
            yield "prose", file
    for file in root.glob(f"{package}-*.dist-info/METADATA"):
        yield "prose", file


def _is_held_out(file: Path) -> bool:
    """True for copies of held-out packages inside others."""
    return any(part.removesuffix(".py") in HELD_OUT for part in file.parts)


def read(file: Path) -> str:
    """The text; empty if the file is too short, too long or not text."""
    try:
        return file.read_text("utf-8") if file.stat().st_size in _SIZES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def grams(ids: np.ndarray) -> np.ndarray:
    """[len(ids) - 12] uint64: a hash of every run of 13 ids."""
    total = np.zeros(max(0, len(ids) - GRAM + 1), dtype=np.uint64)
    for offset in range(GRAM):
        window = ids[offset : offset + len(total)].astype(np.uint64)
        total = total * _HASH_BASE + window + np.uint64(1)
    return total


def write_training(tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Writes the files to train on; returns tokens by kind."""
    found: dict[str, list[Path]] = {"code": [], "prose": []}
    for kind, file in training_files():
        found[kind].append(file)
    counts = {}
    for kind, files in found.items():
        with (out / f"{kind}.bin").open("wb") as sink:
            for first in tqdm(range(0, len(files), 256), desc=kind):
                texts = [t for f in files[first : first + 256] if (t := read(f))]
                for encoding in tokenizer.encode_batch(texts):
                    np.array([*encoding.ids, END_OF_TEXT], np.uint16).tofile(sink)
            counts[kind] = sink.tell() // 2
    return counts


def write_held_out(tokenizer: Tokenizer, out: Path) -> dict[str, dict[str, float]]:
    """Writes held-out files that are new to training; returns figures by package."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = [(p, kind, f) for p in HELD_OUT for kind, f in _package_files_all(root, p)]
    texts = [read(file) for _, _, file in files]
    hashes = [grams(np.array(tokenizer.encode(text).ids)) for text in texts]
    seen = _seen_in_training(np.unique(np.concatenate(hashes)), out)
    report: dict[str, dict[str, float]] = {}
    with (out / "held_out.jsonl").open("w") as sink:
        for (package, kind, file), text, own in zip(files, texts, hashes, strict=True):
            figures = report.setdefault(package, {"kept": 0, "dropped": 0, "overlap": 0.0})
            overlap = float(np.isin(own, seen).mean()) if len(own) else 1.0
            kept = overlap <= MOST_OVERLAP
            figures["kept" if kept else "dropped"] += 1
            figures["overlap"] += overlap * kept
            name = file.relative_to(root).as_posix()
            line = {"package": package, "kind": kind, "file": name, "text": text}
            if kept:
                sink.write(json.dumps(line | {"overlap": round(overlap, 4)}) + "\n")
    for figures in report.values():
        figures["overlap"] = round(figures["overlap"] / max(1, figures["kept"]), 4)
    return report


def _package_files_all(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    for file in sorted((root / package).rglob("*.py")):
        yield "code", file
    for file in root.glob(f"{package}-*.dist-info/METADATA"):
        yield "prose", file


def _seen_in_training(wanted: np.ndarray, out: Path) -> np.ndarray:
    """Those of the sorted hashes `wanted` that the training text holds."""
    found = np.zeros(len(wanted), dtype=bool)
    for kind in ("code", "prose"):
        ids = np.memmap(out / f"{kind}.bin", dtype=np.uint16, mode="r")
        for first in range(0, len(ids), 1 << 22):
            own = grams(ids[first : first + (1 << 22) + GRAM])
            places = np.searchsorted(wanted, own).clip(max=len(wanted) - 1)
            found[places[wanted[places] == own]] = True
    return wanted[found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    tokens = write_training(tokenizer, args.out)
    report = {"training_tokens": tokens, "held_out": write_held_out(tokenizer, args.out)}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
