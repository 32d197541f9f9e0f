"""`vllm-accel ray batch`: many prompts through several engines, on Ray Data.

Ray Data's engine stage does the work. On CPU every other stage would want a CPU for each
engine and wait for it in silence, so prompts are tokenised here, and engines and tasks
ask for fractions.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_accel.errors import AccelError
from vllm_accel.ray import cluster
from vllm_accel.ray.cluster import Where
from vllm_accel.ray.rows import (
    Outcome,
    Parts,
    Prompt,
    book_of,
    check_new,
    read_prompts,
    waiting,
)
from vllm_accel.ray.settings import ReplicaSettings

TASK_CPUS = 0.1
"""CPUs Ray sets aside for a task that only moves rows."""

_MOST_BLOCKS = 2048
_MOST_PASSES = 3
_ENGINE_ERRORS = ("EngineDeadError", "EngineGenerateError")
"""What says something about the engine and nothing about the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What to run where."""

    settings: ReplicaSettings
    input: Path
    output: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of rows that bring none of their own."""
    batch_size: int = 16
    """Rows an engine takes at once, and most that are lost twice over by a kill."""
    flush_rows: int = 64
    """Rows between writes."""
    flush_s: float = 5.0
    """Seconds between writes."""


def run(plan: BatchPlan, where: Where) -> int:
    """Runs a batch, or goes on with it.

    Returns:
        How many rows have an error instead of an answer.

    Raises:
        AccelError: something is wrong with the input, the output or the settings, or
            rows are still missing after three tries.
    """
    check_new(plan.output)
    prompts = read_prompts(plan.input, _tokenizer(plan.settings), plan.sampling)
    parts = Parts(plan.output, book_of(plan.input, _same_batch(plan)))
    progress = Progress(len(prompts), len(parts.done))
    if waiting(prompts, parts.done):
        with cluster.connected(where):
            settings = cluster.fitted(plan.settings)
            plan = dataclasses.replace(plan, settings=settings)
            for _ in range(_MOST_PASSES):
                if todo := waiting(prompts, parts.done):
                    keep(_outcomes(plan, todo), parts, plan, progress)
    if missing := waiting(prompts, parts.done):
        raise AccelError(
            f"{len(missing)} of {len(prompts)} rows have no answer after {_MOST_PASSES} "
            "tries: expected engines that stay alive; see Ray's logs, then give the same "
            "command again."
        )
    return parts.finish(prompts)


def keep(
    outcomes: Iterable[Outcome], parts: Parts, plan: BatchPlan, progress: "Progress"
) -> None:
    """Writes outcomes as they come; what only tells of a dead engine is left undone."""
    held: list[Outcome] = []
    flushed = time.monotonic()
    try:
        for outcome in outcomes:
            if outcome.error.startswith(_ENGINE_ERRORS):
                continue
            held.append(outcome)
            now = time.monotonic()
            if len(held) >= plan.flush_rows or now - flushed >= plan.flush_s:
                parts.add(held)
                held, flushed = [], now
            progress.show(len(parts.done) + len(held))
    finally:  # an interrupted batch keeps these too
        parts.add(held)
        progress.show(len(parts.done), last=True)


class Progress:
    """Says on stderr how far a batch is, a line every few seconds.

    Args:
        rows: of the whole batch.
        before: of them, done by an earlier run.
    """

    every_s = 5.0

    def __init__(self, rows: int, before: int) -> None:
        self._rows, self._before = rows, before
        self._began = time.monotonic()
        self._shown = self._began
        again = f", {before} done before" if before else ""
        cluster.say(f"{rows} rows{again}; starting engines")

    def show(self, done: int, *, last: bool = False) -> None:
        """Says it if it is time to."""
        now = time.monotonic()
        if last or now - self._shown >= self.every_s:
            self._shown = now
            rate = (done - self._before) / max(now - self._began, 1e-9)
            cluster.say(f"{done} of {self._rows} rows, {rate:.2f} rows/s")


def processor_args(plan: BatchPlan) -> dict[str, Any]:
    """What `ray.data.llm.vLLMEngineProcessorConfig` takes.

    All stages but the engine's are off: each would be a pool of actors that asks for CPUs
    of its own.
    """
    settings = plan.settings
    engine_kwargs = settings.engine_kwargs()
    placement = None
    if settings.on_cpu:
        placement = {"bundles": [{"CPU": settings.worker_cpus}] * settings.workers}
        engine_kwargs["distributed_executor_backend"] = "mp"
    return {
        "model_source": settings.model_source,
        "engine_kwargs": engine_kwargs,
        "runtime_env": {"env_vars": settings.env_vars()},
        "placement_group_config": placement,
        "concurrency": (settings.replicas, settings.replicas),
        "batch_size": plan.batch_size,
        "should_continue_on_error": True,
        "chat_template_stage": False,
        "tokenize_stage": False,
        "detokenize_stage": False,
    }


def _outcomes(plan: BatchPlan, prompts: Sequence[Prompt]) -> Iterator[Outcome]:
    """Outcomes of prompts, in the order in which engines finish them."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.data.DataContext.get_current().enable_progress_bars = False
    processor = build_processor(
        vLLMEngineProcessorConfig(**processor_args(plan)),
        preprocess=engine_input,
        postprocess=engine_output,
        preprocess_map_kwargs={"num_cpus": TASK_CPUS},
        postprocess_map_kwargs={"num_cpus": TASK_CPUS},
    )
    rows = [
        {"row": p.row, "token_ids": p.token_ids, "sampling": json.dumps(p.sampling)}
        for p in prompts
    ]
    # An engine takes whole blocks: one block would be one engine's.
    blocks = min(-(-len(rows) // plan.batch_size), _MOST_BLOCKS)
    dataset = ray.data.from_items(rows, override_num_blocks=blocks)
    # Whole blocks, none fetched ahead: rows come when they are answered, not with the
    # next block's.
    blocks_done = processor(dataset).iter_batches(
        batch_size=None, prefetch_batches=0, batch_format="pyarrow"
    )
    for table in blocks_done:
        yield from map(outcome_of, table.to_pylist())


def engine_input(row: dict[str, Any]) -> dict[str, Any]:
    """A row as Ray's engine stage wants it."""
    return {
        "tokenized_prompt": [int(token_id) for token_id in row["token_ids"]],
        "sampling_params": json.loads(row["sampling"]),
    }


def engine_output(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an answered row."""
    return {
        "row": row["row"],
        "text": row["generated_text"],
        "token_ids": [int(token_id) for token_id in row["generated_tokens"]],
        "prompt_tokens": row["num_input_tokens"],
        "output_tokens": row["num_generated_tokens"],
    }


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """An outcome from a row of the processed dataset; failed rows skip `engine_output`."""
    error = str(row.get("__inference_error__") or "")
    if error:
        return Outcome(int(row["row"]), "", [], 0, 0, error)
    return Outcome(
        row=int(row["row"]),
        text=str(row["text"]),
        token_ids=[int(token_id) for token_id in row["token_ids"]],
        prompt_tokens=int(row["prompt_tokens"]),
        output_tokens=int(row["output_tokens"]),
        error="",
    )


def _same_batch(plan: BatchPlan) -> dict[str, Any]:
    settings = plan.settings
    return {
        "model": settings.model_source,
        "speculative_config": settings.speculative_config,
        "lazyllm": settings.lazyllm,
        "engine_args": settings.engine_args,
        "sampling": plan.sampling,
    }


def _tokenizer(settings: ReplicaSettings) -> Any:
    """The model's tokenizer, as vLLM loads it."""
    from vllm_accel.host.engines import tokenizer

    try:
        return tokenizer(settings.model_source)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise AccelError(
            f"The tokenizer of {settings.model} cannot be loaded "
            f"({said[0] if said else error!r}): expected a model folder or hub id that has "
            "one; check --model."
        ) from error
