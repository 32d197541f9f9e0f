"""Writes the tables of README from the results beside this file (`make readme`)."""

import json
import re
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- results: made by `make readme` -->", "<!-- end of results -->"


def table(file: Path) -> str:
    """One file's speeds over plain vLLM: a line per method, a column per batch size."""
    found = json.loads(file.read_text())
    rows = [row for row in found["rows"] if row["prompts"] == found["rows"][0]["prompts"]]
    sizes = sorted({row["batch_size"] for row in rows})
    cells = {(row["method"], row["batch_size"]): cell(row) for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.remove("plain")
    link = f"[all figures]({file.relative_to(README.parent)})"
    asked = dict(pairwise(found["command"]))
    how = f"temperature {asked.get('--temperature', 0)}"
    which = "not looping" if rows[0]["prompts"] == "not_looping" else "all prompts"
    lines = [
        f"**{file.stem}** ({how}, {which}, {found['date'][:10]}, {link})",
        "",
        "| batch | " + " | ".join(map(str, sizes)) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for method in methods:
        filled = " | ".join(cells.get((method, size), "") for size in sizes)
        lines.append(f"| {method} | {filled} |")
    return "\n".join(lines)


def cell(row: dict) -> str:
    """Median, least and greatest ratio to plain vLLM in the same round."""
    ratio = row["ratio_to_plain"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def main() -> None:
    """Puts one table per decode file between README's two marks."""
    tables = "\n\n".join(table(file) for file in sorted(HERE.glob("decode-*.json")))
    between = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.S)
    text, count = between.subn(
        lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", README.read_text()
    )
    if count != 1:
        raise SystemExit(f"{README} has {count} places for results: expected one.")
    README.write_text(text)


if __name__ == "__main__":
    main()
