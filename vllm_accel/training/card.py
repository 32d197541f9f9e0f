"""The model card of trained heads: what they are, on what, how good."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CARD = """\
---
license: {license}
base_model: {base}
library_name: vllm-accel
tags: [vllm, speculative-decoding, {heads}]
---

# {title} draft heads for {base}

{count} parallel draft heads, trained on the frozen model, {shape}. They change how fast
the model is served, not what it says.

    pip install vllm-accel
    vllm serve {model} --speculative-config '{{"method": "cerberus", "model": "{folder}"}}'

## Held out

{held_out_tokens} tokens of the model's own greedy continuations of held-out rows.
Accepted drafts a step, first choice of each head, up to the first wrong one:
**{accepted}**.

| head | right at first choice | among its first five |
|---|---|---|
{table}

Held-out rows come from the same files as the training rows unless the files say
otherwise; on text of another kind expect less.

## Training

{rows} rows of at most {row_tokens} tokens, {epochs:g} epochs, targets: {targets}. Data:

{data}

The licence named above is the trainer's word for these heads; the data's own licences
are those of its sources.
"""


def write(folder: Path, run: Any, figures: Mapping[str, Any], rows: int) -> None:
    """Writes `README.md` into a heads folder.

    Args:
        run: a `training.cerberus.TrainingRun`.
        figures: what `metrics.json` has.
        rows: training rows.
    """
    shares = zip(figures["top1"], figures["top5"], strict=True)
    model = Path(run.model).name if Path(run.model).is_dir() else run.model
    links = "cross-links" if run.cross_links else "no cross-links"
    text = _CARD.format(
        license=run.license,
        base=model,
        heads=run.heads,
        title=run.heads.capitalize(),
        count=run.draft_tokens,
        shape=f"{run.blocks} block{'s' * (run.blocks > 1)} each, {links}",
        model=model,
        folder=folder.name,
        held_out_tokens=figures["held_out_tokens"],
        accepted=figures["accepted_per_step"],
        table="\n".join(
            f"| {i} | {one:.3f} | {five:.3f} |" for i, (one, five) in enumerate(shares, 1)
        ),
        rows=rows,
        row_tokens=run.row_tokens,
        epochs=run.epochs,
        targets=run.targets,
        data="\n".join(f"- `{file.name}`" for file in run.data),
    )
    (folder / "README.md").write_text(text)


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes `metrics.json` into a heads folder."""
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
