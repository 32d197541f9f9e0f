"""Pictures of a bench's rows, drawn by matplotlib without a screen."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vllm_accel.bench.results import Document, Row, is_prefill

# Okabe and Ito's colours, told apart with any kind of colour vision.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
)
_BAND = "#bbbbbb"
_INCHES = (4.2, 3.4)
_COLUMNS = 2
_LEGEND_COLUMNS = 3
_PROMPTS = {"not_looping": "prompts that do not loop", "all": "all prompts"}


@dataclass(frozen=True, slots=True)
class Chart:
    """A title, and what paints it onto axes."""

    title: str
    paint: Callable[[Axes], None]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Names of what is drawn: keys of the rows, and words for people."""

    x: str
    ratio: str
    baseline: str
    x_label: str
    ratio_label: str
    methods: tuple[str, ...]
    """In the order of their colours."""

    @property
    def again(self) -> str:
        """The baseline asked a second time."""
        return f"{self.baseline}_again"


_DECODE = _Kind(
    "batch_size",
    "ratio_to_plain",
    "plain",
    "batch size",
    "tokens/s over plain vLLM",
    ("cerberus", "free", "medusa", "ngram", "suffix", "free-exit", "free-always"),
)
_PREFILL = _Kind(
    "prompt_length",
    "ratio_to_dense",
    "dense",
    "prompt length, tokens",
    "times sooner than dense",
    (
        "lazyllm",
        "random-drop",
        "static-prune",
        "dense-whole",
        "lazyllm-page",
        "lazyllm-token",
        "lazyllm-cerberus",
    ),
)


def charts(content: Document, name: str = "") -> list[Chart]:
    """The pictures of one file; `name` stands before their titles."""
    rows: list[Row] = content["rows"]
    found = _prefill_charts(rows) if is_prefill(content) else _decode_charts(rows)
    return [Chart(f"{name}\n{c.title}", c.paint) if name else c for c in found]


def drawn(chart: Chart) -> Figure:
    """A picture by itself."""
    figure = Figure(figsize=_INCHES, layout="constrained")
    _paint(chart, figure.add_subplot())
    return figure


def svg(chart: Chart) -> str:
    """A picture as an <svg> element."""
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn(chart).savefig(buffer, format="svg", metadata=unsaid)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_png(file: Path, pictures: Sequence[Chart]) -> None:
    """All pictures in one file, two beside each other."""
    rows = -(-len(pictures) // _COLUMNS)
    size = (_INCHES[0] * _COLUMNS, _INCHES[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    for place, chart in enumerate(pictures, 1):
        _paint(chart, figure.add_subplot(rows, _COLUMNS, place))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=150)


def _paint(chart: Chart, axes: Axes) -> None:
    chart.paint(axes)
    axes.set_title(chart.title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the picture, where it covers no figure."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=_LEGEND_COLUMNS,
        fontsize="small",
        frameon=False,
    )


def _decode_charts(rows: Sequence[Row]) -> list[Chart]:
    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    pictures = []
    for name in sets:
        chosen = [row for row in rows if row["prompts"] == name]
        words = _PROMPTS.get(name, name)
        pictures += [
            Chart(f"Decode rate, {words}", _ratios(chosen, _DECODE)),
            Chart(f"Tokens per step, {words}", _tokens_per_step(chosen)),
        ]
    return pictures


def _prefill_charts(rows: Sequence[Row]) -> list[Chart]:
    pictures = [
        Chart("First token", _ratios(rows, _PREFILL)),
        Chart("Time to the first token", _ttft(rows)),
    ]
    if list(_coloured(rows, _PREFILL)):
        pictures.append(Chart("Score, and what it costs", _scores(rows)))
    return pictures + [
        Chart(f"{row['method']}, a prompt of {row['prompt_length']} tokens", _strip(row))
        for row in rows
        if row.get("strip")
    ]


def _ratios(rows: Sequence[Row], kind: _Kind) -> Callable[[Axes], None]:
    """Medians with least and most; the baseline against itself as a band."""

    def paint(axes: Axes) -> None:
        _x_axis(axes, rows, kind)
        _band(axes, [row for row in rows if row["method"] == kind.again], kind)
        axes.axhline(1.0, color="black", linewidth=1)
        for colour, method in _coloured(rows, kind):
            line = [row for row in rows if row["method"] == method]
            _spread_line(axes, line, (kind.x, kind.ratio), method, colour)
        axes.set_ylabel(kind.ratio_label)

    return paint


def _band(axes: Axes, rows: Sequence[Row], kind: _Kind) -> None:
    low = [row[kind.ratio]["min"] for row in rows]
    high = [row[kind.ratio]["max"] for row in rows]
    label = f"{kind.baseline} against itself"
    if len(rows) == 1:  # a band of one point would have no width
        axes.axhspan(low[0], high[0], color=_BAND, alpha=0.6, label=label, lw=0)
    elif rows:
        x = [row[kind.x] for row in rows]
        axes.fill_between(x, low, high, color=_BAND, alpha=0.6, label=label, lw=0)


def _spread_line(
    axes: Axes, rows: Sequence[Row], keys: tuple[str, str], label: str, colour: str
) -> None:
    x_key, y_key = keys
    spreads = [row[y_key] for row in rows]
    medians = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["min"] for spread in spreads]
    above = [spread["max"] - spread["median"] for spread in spreads]
    axes.errorbar(
        [row[x_key] for row in rows],
        medians,
        yerr=[below, above],
        marker="o",
        markersize=4,
        capsize=2,
        color=colour,
        label=label,
    )


def _tokens_per_step(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """Bars side by side for each batch size."""

    def paint(axes: Axes) -> None:
        sizes = sorted({row["batch_size"] for row in rows})
        coloured = list(_coloured(rows, _DECODE))
        width = 0.8 / max(1, len(coloured))
        for place, (colour, method) in enumerate(coloured):
            line = [row for row in rows if row["method"] == method]
            shift = (place - (len(coloured) - 1) / 2) * width
            x = [sizes.index(row["batch_size"]) + shift for row in line]
            heights = [row["tokens_per_step"] for row in line]
            axes.bar(x, heights, width, color=colour, label=method)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axes.set_xlabel("batch size")
        axes.set_ylabel("tokens per request, step")

    return paint


def _ttft(rows: Sequence[Row]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        _x_axis(axes, rows, _PREFILL)
        named = [("black", "dense"), *_coloured(rows, _PREFILL)]
        for colour, method in named:
            line = [row for row in rows if row["method"] == method]
            _spread_line(axes, line, ("prompt_length", "ttft_ms"), method, colour)
        axes.set_ylabel("milliseconds")
        axes.set_ylim(bottom=0)

    return paint


def _scores(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """A point per method and prompt length, told apart by size; dense's scores as lines."""

    def paint(axes: Axes) -> None:
        lengths = sorted({row["prompt_length"] for row in rows})
        for colour, method in [("black", "dense"), *_coloured(rows, _PREFILL)]:
            line = [row for row in rows if row["method"] == method]
            sizes = [20 + 30 * lengths.index(row["prompt_length"]) for row in line]
            ratios = [row["ratio_to_dense"]["median"] for row in line]
            scores = [100 * row["score"] for row in line]
            axes.plot(ratios, scores, color=colour, alpha=0.4, linewidth=1)
            axes.scatter(ratios, scores, sizes, color=colour, label=method)
        axes.set_xlabel("times sooner than dense; larger points, longer prompts")
        axes.set_ylabel("right answers, %")
        axes.set_ylim(0, 103)

    return paint


_SHARES = {".": 0.0, "#": 1.0, **{str(tenth): tenth / 10 for tenth in range(1, 10)}}
"""What a character of a strip means; see `prefill.strip`."""


def _strip(row: Row) -> Callable[[Axes], None]:
    """Pages of a prompt from left to right, spans of layers from top to bottom."""

    def paint(axes: Axes) -> None:
        lines: dict[str, str] = row["strip"]
        ran = [[_SHARES[page] for page in line] for line in lines.values()]
        axes.imshow(
            ran, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="none"
        )
        names = [f"{span}\n{share:.0%}" for span, share in row["rows_run"].items()]
        axes.set_yticks(range(len(lines)), names)
        axes.set_ylabel("layers")
        axes.set_xlabel("page of the prompt; darker: more of it ran")

    return paint


def _x_axis(axes: Axes, rows: Sequence[Row], kind: _Kind) -> None:
    ticks = sorted({row[kind.x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axes.set_xlabel(kind.x_label)


def _coloured(rows: Sequence[Row], kind: _Kind) -> Iterable[tuple[str, str]]:
    """(colour, method), baselines left out; a method keeps its colour in every picture."""
    methods = dict.fromkeys(row["method"] for row in rows)
    shown = [name for name in methods if name not in (kind.baseline, kind.again)]
    known = list(dict.fromkeys([*kind.methods, *shown]))
    return [(_COLOURS[known.index(name) % len(_COLOURS)], name) for name in shown]
