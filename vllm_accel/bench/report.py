"""`bench report`: files of a bench as one page that needs nothing else."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_accel.bench import figures, table
from vllm_accel.bench.results import Document, is_prefill


def write_html(file: Path, documents: Sequence[tuple[str, Document]]) -> None:
    """Writes the page.

    Args:
        file: its folder is made if missing.
        documents: (name to show, content) of each file of a bench.
    """
    environment = Environment(
        loader=PackageLoader("vllm_accel.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja")
    sections = [_section(name, content) for name, content in documents]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.render(sections=sections), encoding="utf-8")


def write_png(file: Path, documents: Sequence[tuple[str, Document]]) -> None:
    """Every picture of every file in one image; titles name the file if there are more."""
    pictures = [
        chart
        for name, content in documents
        for chart in figures.charts(content, name if len(documents) > 1 else "")
    ]
    figures.write_png(file, pictures)


def _section(name: str, content: Document) -> dict[str, Any]:
    """What the template shows of one file."""
    rows = content["rows"]
    counted = [row for row in rows if row.get("gate_open_share") is not None]
    return {
        "name": name,
        "prefill": is_prefill(content),
        "svgs": [figures.svg(chart) for chart in figures.charts(content)],
        "time": table.cells(counted, table.TIME) if counted else [],
        "rows": table.cells(rows, table.columns(content)),
        "command": shlex.join(content["command"]),
        "facts": {
            "date": content["date"],
            **content["machine"],
            **content["versions"],
        },
    }
