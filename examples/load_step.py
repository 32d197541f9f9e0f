"""The gate while the load changes: 1 request, then 32, then 1 again, in one engine.

    python examples/load_step.py --output load_step.json

For each phase, after its first 50 steps: the share of decisions that were open, what an
oracle that knows the mean acceptance and the measured cost would do, and how well step
times were predicted.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.goodput import Goodput
from vllm_accel.serve import with_preloads

HERE = Path(__file__).parent / "reference_model"
PHASES = (1, 32, 1)
SETTLE = 50


def run(model: str, prompts: Path, tokens: int) -> None:
    """Asks the engine for each phase; the gate writes to ACCEL_RECORD."""
    gate = "vllm_accel.testing:RecordingGoodput"
    llm = LLM(
        model,
        max_model_len=2048,
        max_num_seqs=32,
        kv_cache_memory_bytes=2**28,
        speculative_config={"method": "cerberus", "gate": gate},
    )
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    texts = [texts[i % len(texts)] for i in range(max(PHASES))]
    for requests in PHASES:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        with Path(os.environ["ACCEL_RECORD"]).open("a") as record:
            record.write(json.dumps({"phase": requests}) + "\n")
        llm.generate(texts[:requests], sampling, use_tqdm=False)


def phases(lines: list[dict]) -> list[list[dict]]:
    """The lines of each phase, which begin with a mark of `run`."""
    parts: list[list[dict]] = []
    for line in lines:
        if "phase" in line:
            parts.append([])
        elif parts:
            parts[-1].append(line)
    return parts


def figures(lines: list[dict], requests: int) -> dict:
    """Of one phase, its first decisions apart."""
    decisions = [line for line in lines if line.get("decided") == requests][SETTLE:]
    verdicts = [line for line in lines if "verified" in line]
    times = [line for line in lines if "seconds" in line and not line["prefill_tokens"]]
    errors = [abs(t["predicted"] / t["seconds"] - 1) for t in times[SETTLE:]]
    opened = sum(d["opened"] for d in decisions) / sum(d["decided"] for d in decisions)
    accepted = sum(v["accepted"] for v in verdicts) / max(1, len(verdicts))
    return {
        "requests": requests,
        "decisions": len(decisions),
        "open_share": round(opened, 3),
        "accepted_per_draft": round(accepted, 3),
        "median_prediction_error": round(statistics.median(errors), 3),
        "oracle_gain": round(oracle_gain(lines, requests, accepted), 3),
    }


def oracle_gain(lines: list[dict], requests: int, accepted: float) -> float:
    """Rate of always drafting over never, by mean acceptance and the learnt cost."""
    cost = Goodput(4).cost
    for line in lines:
        if "seconds" in line:
            shape = {k: v for k, v in line.items() if k not in ("seconds", "predicted")}
            cost.observe(StepShape(**shape), line["seconds"])
    drafts = statistics.mean(v["verified"] for v in lines if "verified" in v)
    plain = cost.seconds(StepShape(requests, requests))[0]
    rows = requests * (1 + drafts)
    drafting = cost.seconds(StepShape(rows, requests, 0, requests))[0]
    return float((1 + accepted) * plain / drafting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "weights"))
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts" / "code.jsonl")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = Path(tempfile.mkdtemp()) / "record.jsonl"
    os.environ["ACCEL_RECORD"] = str(record)
    run(args.model, args.prompts, args.tokens)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    parts = zip(phases(lines), PHASES, strict=True)
    found = [figures(part, requests) for part, requests in parts]
    print(json.dumps(found, indent=2))
    if args.output:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        written = {"date": date, "command": sys.argv, "phases": found}
        args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    wanted = with_preloads(os.environ)
    if wanted.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    main()
