"""Offline: a long prompt, dense and with tokens that do not matter left out.

python examples/offline_lazyllm.py [MODEL]
"""

import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = Path(__file__).parent / "reference_model" / "weights"
FILLER = "def step_{0}(value):\n    return value * {0} + {1}\n\n\n"
PROMPT = 'REGISTRY["lantern"] = "472"\n\n' + "".join(
    FILLER.format(i, 7 * i) for i in range(90)
)
QUESTION = 'assert REGISTRY["lantern"] == "'

if __name__ == "__main__":
    llm = LLM(
        str(sys.argv[1] if len(sys.argv) > 1 else MODEL),
        additional_config={"lazyllm": {"min_prompt": 512}},
        max_model_len=4096,
        kv_cache_memory_bytes=2**28,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    for keep in (1.0, 0.1):  # 1.0 is plain vLLM
        sampling = SamplingParams(
            temperature=0, max_tokens=3, extra_args={"lazyllm": {"keep": keep}}
        )
        llm.generate(PROMPT + QUESTION, sampling, use_tqdm=False)  # warm
        began = time.perf_counter()
        answer = llm.generate(PROMPT + QUESTION, sampling, use_tqdm=False)[0]
        took = time.perf_counter() - began
        print(f"keep {keep}: {answer.outputs[0].text!r} in {1e3 * took:.0f} ms")
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:accel_prompt"):
            print(metric.name, metric.labels, metric.value)
