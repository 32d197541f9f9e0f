"""The page and the pictures of a bench."""

import re
from html.parser import HTMLParser

import pytest

from vllm_accel.bench import results, table
from vllm_accel.cli import main

SIZES = (1, 8)


def spread(low):
    return {"min": low, "median": low + 0.1, "max": low + 0.2}


def decode_row(method, batch_size, prompts, ratio):
    return {
        "method": method,
        "batch_size": batch_size,
        "prompts": prompts,
        "tokens_per_s": spread(100 * ratio),
        "ratio_to_plain": spread(ratio),
        "tokens_per_step": 1.5,
        "gate_open_share": 0.25 if method == "cerberus" else None,
        "draft_cost_share": None,
        "looping_share": 0.0,
        "identical_tokens": 12,
        "ties": 0,
        "differences": 0,
    }


def prefill_row(method, length):
    return {
        "method": method,
        "prompt_length": length,
        "ttft_ms": spread(50),
        "ratio_to_dense": spread(0.9),
        "score": 0.5,
        "score_dense": 0.5,
        "n": 24,
        "lost": 0,
        "won": 0,
        "mcnemar_p": 1.0,
        "kv_pages_ratio": 1.0,
        "kv_pages_formula": 1.0,
        "strip": {"[0,3)": "####", "[3,12)": "#.19"} if method == "lazyllm" else None,
        "rows_run": {"[0,3)": 1.0, "[3,12)": 0.5} if method == "lazyllm" else None,
    }


def write(file, rows):
    command = ["vllm-accel", "bench", "--cerberus", '{"gate": "<b>"}']
    content = results.document(command, "cpu") | {"rows": rows}
    results.write(file, content)
    return file


@pytest.fixture
def decode_file(tmp_path):
    rows = [
        decode_row(method, size, prompts, ratio)
        for size in SIZES
        for prompts in ("not_looping", "all")
        for method, ratio in (("plain", 1), ("cerberus", 1.4), ("plain_again", 0.95))
    ]
    return write(tmp_path / "decode.json", rows)


@pytest.fixture
def prefill_file(tmp_path):
    methods = ("dense", "dense_again")
    return write(tmp_path / "prefill.json", [prefill_row(m, 1024) for m in methods])


class Page(HTMLParser):
    """Tags that were opened and not closed, links, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(tmp_path, *files):
    pytest.importorskip("matplotlib")
    html, png = tmp_path / "out" / "report.html", tmp_path / "out" / "report.png"
    arguments = [*map(str, files), "--html", str(html), "--png", str(png)]
    assert main(["bench", "report", *arguments]) == 0
    return html.read_text(), png.read_bytes()


def test_one_page_shows_every_file_and_needs_no_network(
    tmp_path, decode_file, prefill_file
):
    text, png = report(tmp_path, decode_file, prefill_file)
    page = Page(text)
    assert page.open == []
    assert page.found.count("svg") == 4 + 2
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.found
    assert not re.search(r"url\((?!#)|@import", text)
    assert 'name="viewport"' in text
    assert png.startswith(b"\x89PNG")


def test_the_page_says_how_it_was_measured(tmp_path, decode_file):
    text, _ = report(tmp_path, decode_file)
    page = Page(text)
    content = results.load(decode_file)
    assert content["date"] in page.text
    assert content["machine"]["cpu"] in page.text
    assert '\'{"gate": "<b>"}\'' in page.text
    assert "b" not in page.found, "what the user typed stays text"
    assert "1.50 (1.40 to 1.60)" in page.text
    assert "25%" in page.text


def test_one_batch_size_is_enough_for_a_picture(tmp_path):
    rows = [decode_row(m, 1, "all", 1.0) for m in ("plain", "ngram", "plain_again")]
    text, _ = report(tmp_path, write(tmp_path / "one.json", rows))
    assert Page(text).found.count("svg") == 2


def test_of_a_pruned_prompt_what_ran_is_drawn(tmp_path):
    rows = [
        prefill_row(method, length)
        for length in (1024, 4096)
        for method in ("dense", "lazyllm", "dense_again")
    ]
    text, _ = report(tmp_path, write(tmp_path / "lazy.json", rows))
    assert Page(text).found.count("svg") == 3 + 2


def test_whole_answers_have_columns_where_they_were_timed():
    row = prefill_row("dense", 1024)
    assert "whole answer" not in table.as_text({"rows": [row]})
    whole = {"total_ms": spread(500), "total_ratio_to_dense": spread(1)}
    assert "whole answer, ms" in table.as_text({"rows": [row | whole]})


def test_the_legend_covers_no_figure_and_fits():
    figures = pytest.importorskip("vllm_accel.bench.figures")
    methods = ("plain", "cerberus", "medusa", "ngram", "suffix", "free", "plain_again")
    rows = [decode_row(m, size, "not_looping", 1.2) for size in SIZES for m in methods]
    for chart in figures.charts({"rows": rows}):
        figure = figures.drawn(chart)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 < axes.xaxis.label.get_window_extent().y0
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= legend.y0


def test_a_method_has_the_same_colour_in_every_picture():
    figures = pytest.importorskip("vllm_accel.bench.figures")
    seen = set()
    for methods in (("plain", "suffix", "cerberus"), ("plain", "cerberus")):
        rows = [decode_row(m, size, "all", 1.2) for size in SIZES for m in methods]
        (axes,) = figures.drawn(figures.charts({"rows": rows})[0]).axes
        handles, labels = axes.get_legend_handles_labels()
        colours = {
            handle.lines[0].get_color()
            for handle, label in zip(handles, labels, strict=True)
            if label == "cerberus"
        }
        seen |= colours
    assert len(seen) == 1


def test_the_table_has_columns_of_equal_width(decode_file):
    lines = table.as_text(results.load(decode_file)).splitlines()
    assert len(lines) == 1 + 12
    at = lines[0].index("over plain")
    assert lines[2][at:].startswith("1.50 (1.40 to 1.60)")
    assert " -" in lines[1]
