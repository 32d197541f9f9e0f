"""How many questions LazyLLM still answers, and how much sooner, by what it keeps.

    python keep_study.py MODEL --length 4096 --questions 100

One engine: each question is asked once with every share, the whole prompt among them, so
that a machine whose speed drifts slows all alike.
"""

import argparse
import json
import statistics

from tqdm import tqdm

from vllm_accel.bench import prefill, tasks
from vllm_accel.host import engines

KEEPS = [1.0, [0.4, 0.4], [0.316, 0.1], [0.25, 0.25], [0.2, 0.2], [0.15, 0.15]]
"""Left at each pruning point; a lone number is the default's way to it."""


def ask(engine, question, keep) -> tuple[float, list[int]]:
    """Milliseconds to the first token, and the answer's token ids."""
    engine.reset_prefix_cache()
    sampling = {
        "temperature": 0.0,
        "max_tokens": question.max_tokens,
        "extra_args": {"lazyllm": {"keep": keep}},
    }
    steps = engine.run([question.token_ids], [sampling])
    said = [token for _, given in steps for token in given.get(0, [])]
    return 1e3 * steps[0][0], said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--keeps", type=json.loads, default=KEEPS)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--lazyllm", type=json.loads, default={}, help="more settings")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    tokenizer = engines.tokenizer(options.model)
    questions = tasks.made(tokenizer, options.length, options.questions)
    engine = engines.Engine(
        model=options.model,
        max_model_len=options.length,
        max_num_seqs=8,
        kv_cache_memory_bytes=2**28,
        block_size=options.block_size,
        dtype=options.dtype,
        additional_config={"lazyllm": options.lazyllm},
    )
    ask(engine, questions[0], 0.5)  # not counted
    right, ms = [[] for _ in options.keeps], [[] for _ in options.keeps]
    for question in tqdm(questions):
        for i, keep in enumerate(options.keeps):
            took, said = ask(engine, question, keep)
            right[i].append(tasks.is_right(question, tokenizer.decode(said)))
            ms[i].append(took)
    engine.close()
    print(f"{'keep':16} right  lost won  p     first token, ms  times sooner (quartiles)")
    for keep, ours, times in zip(options.keeps, right, ms, strict=True):
        lost, won = prefill.lost_and_won(ours, right[0])
        ratios = [a / b for a, b in zip(ms[0], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{keep!s:16} {statistics.fmean(ours):.3f}  {lost:3}  {won:3}  "
            f"{prefill.mcnemar_p(lost, won):.3f} {statistics.median(times):8.0f}"
            f"          {middle:.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
