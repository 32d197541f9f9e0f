"""Runs one vLLM engine in a process of its own: JSON in, JSON out.

Input: {"engine": {LLM arguments}, "batches": [{"prompts": [[ids]], "sampling": [{...}]}]}
Output: {"batches": [[{token_ids, text, finish_reason, gaps}]], "metrics": {...}}.
"""

import json
import sys

if __name__ == "__main__":
    task = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.metrics.reader import Counter, Vector

    llm = LLM(**task["engine"], disable_log_stats=False)

    def sampling_params(regex=None, **sampling):
        grammar = StructuredOutputsParams(regex=regex) if regex else None
        return SamplingParams(structured_outputs=grammar, **sampling)

    def top2_gaps(completion):
        """Plain logprob gap between the two best tokens, per output token."""
        gaps = []
        for position in completion.logprobs or []:
            best = sorted((p.logprob for p in position.values()), reverse=True)
            gaps.append(best[0] - best[1])
        return gaps

    batches = []
    for batch in task["batches"]:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in batch["prompts"]],
            [sampling_params(**sampling) for sampling in batch["sampling"]],
            use_tqdm=False,
        )
        batches.append(
            [
                {
                    "token_ids": list(c.token_ids),
                    "text": c.text,
                    "finish_reason": c.finish_reason,
                    "stop_reason": c.stop_reason,
                    "gaps": top2_gaps(c),
                }
                for output in outputs
                for c in output.outputs
            ]
        )

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
    with open(sys.argv[1], "w") as result:
        json.dump({"batches": batches, "metrics": metrics}, result)
