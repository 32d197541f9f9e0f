"""Writes the tables of README from the results beside this file (`make readme`)."""

import json
import re
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
MARKS = "<!-- {0}: made by `make readme` -->", "<!-- end of {0} -->"


def decode_table(file: Path) -> str:
    """One file's speeds over plain vLLM: a line per method, a column per batch size."""
    found = json.loads(file.read_text())
    rows = [row for row in found["rows"] if row["prompts"] == found["rows"][0]["prompts"]]
    sizes = sorted({row["batch_size"] for row in rows})
    cells = {(row["method"], row["batch_size"]): ratio(row) for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.remove("plain")
    asked = dict(pairwise(found["command"]))
    which = "not looping" if rows[0]["prompts"] == "not_looping" else "all prompts"
    how = f"temperature {asked.get('--temperature', 0)}, {which}"
    lines = [title(file, found, how), "", *header(["batch", *map(str, sizes)])]
    for method in methods:
        filled = " | ".join(cells.get((method, size), "") for size in sizes)
        lines.append(f"| {method} | {filled} |")
    return "\n".join(lines)


def prefill_table(file: Path) -> str:
    """One file's times and scores: a line per method and prompt length."""
    found = json.loads(file.read_text())
    questions = max(row["n"] for row in found["rows"])
    whole = "total_ratio_to_dense" in found["rows"][0]
    names = ["prompt", "method", "first token sooner", *["whole answer sooner"] * whole]
    names += ["right", "lost, won", "KV pages"]
    lines = [title(file, found, f"{questions} questions"), "", *header(names)]
    for row in found["rows"]:
        length = row["prompt_length"]
        right, pages = f"{row['score']:.1%}", row["kv_pages_ratio"]
        parted = f"{row['lost']}, {row['won']}"
        cells = [length, row["method"], ratio(row, "ratio_to_dense")]
        cells += [ratio(row, "total_ratio_to_dense")] * whole + [right, parted]
        cells.append("" if pages is None else f"{pages:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def title(file: Path, found: dict, how: str) -> str:
    """What was measured, when, and where all of it stands."""
    link = f"[all figures]({file.relative_to(README.parent)})"
    return f"**{file.stem}** ({how}, {found['date'][:10]}, {link})"


def header(names: list[str]) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def ratio(row: dict, key: str = "ratio_to_plain") -> str:
    """Median, least and greatest ratio to the baseline in the same round."""
    found = row[key]
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


TABLES = {
    "results": ("decode-*.json", decode_table),
    "prefill": ("prefill-*.json", prefill_table),
}
"""Name of the marks in README: the files beside this one, and what is made of each."""


def main() -> None:
    """Puts the tables between their marks."""
    text = README.read_text()
    for name, (files, table) in TABLES.items():
        tables = "\n\n".join(table(file) for file in sorted(HERE.glob(files)))
        begin, end = (mark.format(name) for mark in MARKS)
        between = re.compile(re.escape(begin) + ".*" + re.escape(end), re.S)
        filled = f"{begin}\n\n{tables}\n\n{end}"
        text, count = between.subn(lambda _, filled=filled: filled, text)
        if count != 1:
            raise SystemExit(f"{README} has {count} places for {name}: expected one.")
    README.write_text(text)


if __name__ == "__main__":
    main()
