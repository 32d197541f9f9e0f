"""Runs vLLM engines, each in a process of its own: a line of JSON in for each.

vLLM is imported once and the processes are forked from there, as importing takes longer
than many an engine lives. Nothing of vLLM but its modules is there before the fork.

In: {"folder", "env": {}, "engine": {LLM arguments}, "batches": [{"prompts": [[ids]],
"sampling": [{...}]}]}. Out, when the engine has ended: its exit status. In the folder are
then its log and result.json: {"batches": [[{token_ids, text, finish_reason, stop_reason,
gaps, report}]], "metrics": {...}, "metrics_by_batch": [{...}, of this batch and those
before]}.
"""

import json
import os
import signal
import sys
from pathlib import Path

SECONDS = 600


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Once, for all engines: children are forked with these in memory.
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(task):
    signal.alarm(SECONDS)
    folder = Path(task["folder"])
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(task["env"])
    from vllm import LLM

    llm = LLM(**task["engine"], disable_log_stats=False)
    batches, metrics = [], []
    for batch in task["batches"]:
        batches.append(interrupted(llm, batch) if "late" in batch else asked(llm, batch))
        metrics.append(counted(llm))
    result = {"batches": batches, "metrics": metrics[-1], "metrics_by_batch": metrics}
    (folder / "result.json").write_text(json.dumps(result))


def asked(llm, batch):
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in batch["prompts"]],
        [sampling_params(**sampling) for sampling in batch["sampling"]],
        use_tqdm=False,
    )
    return [as_json(output, c) for output in outputs for c in output.outputs]


def interrupted(llm, batch):
    """The first request ends at `abort_at` tokens; the last comes `late` steps late."""
    from vllm.inputs.engine import tokens_input

    engine, outputs, steps = llm.llm_engine, {}, 0
    names = [f"interrupted-{i}" for i in range(len(batch["prompts"]))]
    waiting = list(zip(names, batch["prompts"], batch["sampling"], strict=True))
    first_runs = True
    while waiting or engine.has_unfinished_requests():
        while len(waiting) > 1 or (
            waiting and (steps >= batch["late"] or not engine.has_unfinished_requests())
        ):
            name, prompt, sampling = waiting.pop(0)
            engine.add_request(name, tokens_input(prompt), sampling_params(**sampling))
        outputs |= {output.request_id: output for output in engine.step()}
        steps += 1
        if first_runs and given(outputs, names[0]) >= batch["abort_at"]:
            engine.abort_request(names[:1])
            first_runs = False
    return [as_json(outputs[name], outputs[name].outputs[0]) for name in names]


def given(outputs, name):
    return len(outputs[name].outputs[0].token_ids) if name in outputs else 0


def sampling_params(regex=None, **sampling):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex=regex) if regex else None
    return SamplingParams(structured_outputs=grammar, **sampling)


def as_json(output, completion):
    return {
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "gaps": top2_gaps(completion),
        "report": (output.kv_transfer_params or {}).get("vllm_accel"),
    }


def top2_gaps(completion):
    """Plain logprob gap between the two best tokens, per output token."""
    gaps = []
    for position in completion.logprobs or []:
        best = sorted((p.logprob for p in position.values()), reverse=True)
        gaps.append(best[0] - best[1])
    return gaps


def counted(llm):
    """{name|labels of ours: value} of the engine's counters."""
    from vllm.v1.metrics.reader import Counter, Vector

    metrics = {}
    for metric in llm.get_metrics():
        if isinstance(metric, Counter):
            own = [
                f"{k}={v}"
                for k, v in sorted(metric.labels.items())
                if k in ("state", "reason", "length")
            ]
            metrics["|".join([metric.name, *own])] = metric.value
        elif isinstance(metric, Vector):
            metrics[metric.name] = metric.values
    return metrics


if __name__ == "__main__":
    sys.exit(main())
