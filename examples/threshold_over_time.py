"""Free's threshold while it serves one kind of text, then another, in one engine.

    python examples/threshold_over_time.py MODEL --prompts A.jsonl B.jsonl

Mode `exit`. Draws the threshold of the gate `quality`, which decides, whatever it costs,
and the one FREE's own estimator would have from the same evidence.
"""

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path

from vllm import LLM, SamplingParams

LINES = {"quality": "tab:blue", "beta_mixture": "tab:orange"}
SMOOTH = 200


def record(options: argparse.Namespace, file: Path) -> list[list[dict]]:
    """What the gate wrote of each file of prompts."""
    os.environ["ACCEL_RECORD"] = str(file)
    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=options.batch_size,
        kv_cache_memory_bytes=2**28,
        speculative_config={
            "method": "free",
            "mode": "exit",
            "gate": "vllm_accel.testing:RecordingQuality",
            "exit_quality": options.exit_quality,
            **({"exit_layer": options.exit_layer} if options.exit_layer else {}),
        },
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    parts, seen = [], 0
    for prompts in options.prompts:
        texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
        llm.generate(texts[: options.num_prompts], sampling)
        lines = file.read_text().splitlines()
        parts.append([json.loads(line) for line in lines[seen:]])
        seen = len(lines)
    return parts


def figures(lines: list[dict]) -> dict:
    """Of one kind of text."""
    drafted = sum(line["drafted"] for line in lines)
    right = sum(sum(line["agree"][: line["drafted"]]) for line in lines)
    tokens = drafted + len(lines)
    return {
        "tokens": tokens,
        "exited": drafted / tokens,
        "agreement": 1 - (drafted - right) / tokens,
        **{f"{name}_at_the_end": lines[-1][name] for name in LINES},
    }


def draw(parts: list[list[dict]], names: list[str], wanted: float, file: Path) -> None:
    """Thresholds above, agreement of the last tokens below, by tokens given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    lines = list(itertools.chain(*parts))
    at = list(itertools.accumulate(line["drafted"] + 1 for line in lines))
    for name, colour in LINES.items():
        above.plot(at, [line[name] for line in lines], color=colour, label=name)
    above.set_ylabel("threshold (confidence)")
    above.legend()
    below.plot(at, agreement(lines), color="tab:blue")
    below.axhline(wanted, color="grey", linestyle=":")
    below.set_ylabel(f"agreement, last {SMOOTH} stacks")
    below.set_xlabel("tokens given")
    begins = [0, *itertools.accumulate(map(len, parts))]
    for begin, name in zip(begins, names, strict=False):
        place = at[begin]
        above.axvline(place, color="grey")
        above.text(place, 1.0, f" {name}", transform=above.get_xaxis_transform())
    figure.savefig(file, dpi=100)


def agreement(lines: list[dict]) -> list[float]:
    """After every stack, the share of tokens of the last ones that the model would say."""
    found = []
    for i in range(1, len(lines) + 1):
        last = figures(lines[max(0, i - SMOOTH) : i])
        found.append(last["agreement"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--exit-layer", type=int, help="default: the model's exit's")
    parser.add_argument("--exit-quality", type=float, default=0.99)
    parser.add_argument("--num-prompts", type=int, default=64, help="of each file")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("threshold.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = record(options, Path(folder) / "record.jsonl")
    names = [prompts.stem for prompts in options.prompts]
    for name, part in zip(names, parts, strict=True):
        print(name, json.dumps(figures(part)))
    draw(parts, names, options.exit_quality, options.output)


if __name__ == "__main__":
    main()
