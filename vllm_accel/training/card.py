"""The model card of what was trained: what it is, on what, how good."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CARD = """\
---
license: {license}
base_model: {base}
library_name: vllm-accel
tags: [vllm, speculative-decoding, {tag}]
---

# {title}

{about}

    pip install vllm-accel
    vllm serve {serve}

## Held out

{held_out}

Held-out rows come from the same files as the training rows unless the files say
otherwise; on text of another kind expect less.

## Training

{rows} rows of at most {row_tokens} tokens, {epochs:g} epochs, {how}. Data:

{data}

The licence named above is the trainer's word for {what}; the data's own licences
are those of its sources.
"""

_HEADS = """\
{count} parallel draft heads, trained on the frozen model, {shape}. They change how fast
the model is served, not what it says."""

_HEADS_HELD_OUT = """\
{held_out_tokens} tokens of held-out continuations: the data's, or the model's own greedy
ones of plain text. Accepted drafts a step, first choice of each head, up to the first
wrong one: **{accepted_per_step}**.

| head | right at first choice | among its first five |
|---|---|---|
{table}"""

_ADAPTER = """\
An exit after layer {exit_layer} of {num_layers}: the model's first layers draft, its deep
layers check (FREE, arXiv 2310.05424). An adapter ({adapter}, {width} wide) was trained on
the frozen model. In mode `verify` it changes how fast the model is served, not what it
says."""

_WHOLE = """\
The model {base}, trained further so that it can exit after layer {exit_layer} of
{num_layers}: the first layers draft, the deep layers check (FREE, arXiv 2310.05424). The
exit is in the folder `free`. The weights are bfloat16 and not those of {base}: held-out
loss of the whole model is {deep_loss_before} nats a token before this training and
{deep_loss} after."""

_EXIT_HELD_OUT = """\
{held_out_tokens} tokens of held-out continuations: the data's, or the model's own greedy
ones of plain text. The first choice at the exit is the whole model's in
**{agreement:.1%}** of tokens, for {mean_agreed_run:.2f} tokens in a row. Area under the
ROC curve of its confidence for agreement: {auc}. {trusted}

| threshold | exit rate | of these agree |
|---|---|---|
{table}"""


def write_heads(folder: Path, run: Any, figures: Mapping[str, Any], rows: int) -> None:
    """Writes `README.md` into a heads folder.

    Args:
        run: a `training.cerberus.TrainingRun`.
        figures: what `metrics.json` has.
        rows: training rows.
    """
    shares = zip(figures["top1"], figures["top5"], strict=True)
    table = "\n".join(
        f"| {i} | {one:.3f} | {five:.3f} |" for i, (one, five) in enumerate(shares, 1)
    )
    links = "cross-links" if run.cross_links else "no cross-links"
    reads = ", reading the chosen token" if run.reads_token else ""
    shape = f"{run.blocks} block{'s' * (run.blocks > 1)} each, {links}{reads}"
    base = _base_name(run)
    method = f'{{"method": "cerberus", "model": "{folder.name}"}}'
    parts = {
        "tag": run.heads,
        "title": f"{run.heads.capitalize()} draft heads for {base}",
        "about": _HEADS.format(count=run.draft_tokens, shape=shape),
        "serve": f"{base} --speculative-config '{method}'",
        "held_out": _HEADS_HELD_OUT.format(**figures, table=table),
        "how": f"targets: {run.targets}",
        "what": "these heads",
    }
    _write(folder, run, parts, rows)


def write_exit(
    folder: Path, run: Any, figures: Mapping[str, Any], num_layers: int, rows: int
) -> None:
    """Writes `README.md` beside an exit, or into the model that was trained with one.

    Args:
        run: a `training.free.ExitRun`.
        figures: what `metrics.json` has.
        num_layers: of the model.
        rows: training rows.
    """
    base, auc = _base_name(run), figures["confidence_auc"]
    about = (_ADAPTER if run.freeze_base else _WHOLE).format(
        **figures,
        base=base,
        exit_layer=run.exit_layer,
        num_layers=num_layers,
        adapter=run.adapter,
        width=run.adapter_width,
    )
    serve = f"{folder.name} --speculative-config free"
    if run.freeze_base:
        method = f'{{"method": "free", "model": "{folder.name}"}}'
        serve = f"{base} --speculative-config '{method}'"
    parts = {
        "tag": "early-exit",
        "title": f"Exit after layer {run.exit_layer} of {base}",
        "about": about,
        "serve": serve,
        "held_out": _EXIT_HELD_OUT.format(
            **figures,
            auc="unknown, as there is one kind only" if auc is None else f"{auc:.3f}",
            trusted=_trusted(figures["threshold"]),
            table="\n".join(map(_exit_line, figures["thresholds"])),
        ),
        "how": f"targets: {run.targets}, distillation: {run.kd} with weight "
        f"{run.kd_weight:g}",
        "what": "this exit" if run.freeze_base else "these weights",
    }
    _write(folder, run, parts, rows)


def _trusted(threshold: float) -> str:
    if threshold == 1:
        return "At no confidence do 99 % of exits agree."
    return f"Above a confidence of {threshold}, 99 % of exits agree."


def _exit_line(line: Mapping[str, Any]) -> str:
    right = line["agreement"]
    shown = "none exits" if right is None else f"{right:.3f}"
    return f"| {line['threshold']:g} | {line['exit_rate']:.3f} | {shown} |"


def _base_name(run: Any) -> str:
    return Path(run.model).name if Path(run.model).is_dir() else run.model


def _write(folder: Path, run: Any, parts: Mapping[str, str], rows: int) -> None:
    text = _CARD.format(
        **parts,
        license=run.license,
        base=_base_name(run),
        rows=rows,
        row_tokens=run.row_tokens,
        epochs=run.epochs,
        data="\n".join(f"- `{file.name}`" for file in run.data),
    )
    (folder / "README.md").write_text(text)


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes `metrics.json` beside what was trained."""
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
