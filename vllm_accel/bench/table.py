"""Rows of a bench as columns of text, for the terminal and for the page."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_accel.bench.results import Document, Row, is_prefill

Column = tuple[str, Callable[[Row], str]]


def _key(name: str) -> Callable[[Row], str]:
    return lambda row: _text(row.get(name), "")


def _spread(name: str, digits: int) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        values = row[name]
        low, median, high = (f"{values[k]:.{digits}f}" for k in ("min", "median", "max"))
        return f"{median} ({low} to {high})"

    return cell


def _number(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: _text(row.get(name), f".{digits}f")


def _share(name: str) -> Callable[[Row], str]:
    return lambda row: _text(row.get(name), ".0%")


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: _text(row.get(name), ".1%")


def _text(value: Any, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


DECODE: list[Column] = [
    ("method", _key("method")),
    ("batch", _key("batch_size")),
    ("prompts", _key("prompts")),
    ("tokens/s", _spread("tokens_per_s", 0)),
    ("over plain", _spread("ratio_to_plain", 2)),
    ("tokens/step", _number("tokens_per_step", 2)),
    ("gate open", _share("gate_open_share")),
    ("draft cost", _share("draft_cost_share")),
    ("layers/token", _number("layers_per_token", 1)),
    ("agreement", _percent("agreement")),
    ("looping", _share("looping_share")),
    ("identical", _key("identical_tokens")),
    ("ties", _key("ties")),
    ("different", _key("differences")),
]

PREFILL: list[Column] = [
    ("method", _key("method")),
    ("prompt", _key("prompt_length")),
    ("first token, ms", _spread("ttft_ms", 1)),
    ("times sooner than dense", _spread("ratio_to_dense", 2)),
    ("score", _share("score")),
    ("dense's score", _share("score_dense")),
    ("n", _key("n")),
    ("lost", _key("lost")),
    ("won", _key("won")),
    ("p", _number("mcnemar_p", 2)),
    ("KV pages", _number("kv_pages_ratio", 2)),
    ("formula", _number("kv_pages_formula", 2)),
]

WHOLE: list[Column] = [
    ("whole answer, ms", _spread("total_ms", 0)),
    ("times sooner", _spread("total_ratio_to_dense", 2)),
]
"""Where `bench prefill` had --max-tokens."""

TIME: list[Column] = [DECODE[i] for i in (0, 1, 2, 6, 7, 8)]
"""Where a method's time goes."""


def columns(content: Document) -> list[Column]:
    """The columns of a file's rows."""
    if not is_prefill(content):
        return DECODE
    whole = all("total_ms" in row for row in content["rows"])
    return PREFILL + WHOLE if whole else PREFILL


def cells(rows: Sequence[Row], of: Sequence[Column]) -> list[list[str]]:
    """The header, then a line per row."""
    header = [name for name, _ in of]
    return [header, *([cell(row) for _, cell in of] for row in rows)]


def as_text(content: Document) -> str:
    """Lines with columns of equal width."""
    lines = cells(content["rows"], columns(content))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
