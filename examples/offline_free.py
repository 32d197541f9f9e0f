"""Offline: the model's own first layers draft, its deep layers verify.

python examples/offline_free.py [MODEL [LAYERS_BEFORE_THE_EXIT]]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = Path(__file__).parent / "reference_model" / "weights"
PROMPT = "import json\n\n\ndef load_config(path):\n"

if __name__ == "__main__":
    llm = LLM(
        str(sys.argv[1] if len(sys.argv) > 1 else MODEL),
        speculative_config={"method": "free", "exit_layer": int([*sys.argv, 3, 3][2])},
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        disable_log_stats=False,
    )
    answer = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=64))[0]
    print(PROMPT + answer.outputs[0].text)
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:accel_"):
            print(metric.name, metric.labels, metric.value)
