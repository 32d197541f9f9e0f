"""Offline: the model's own first layers draft, its deep layers verify.

python examples/offline_free.py [MODEL [LAYERS_BEFORE_THE_EXIT]]
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = Path(__file__).parent / "reference_model" / "edit"
CODE = """\
def load_config(path):
    with open(path) as file:
        return json.load(file)


def save_config(path, config):
    with open(path, "w") as file:
        json.dump(config, file)
"""
PROMPT = f"# code\n{CODE}# rename path to location\n"

if __name__ == "__main__":
    llm = LLM(
        str(sys.argv[1] if len(sys.argv) > 1 else MODEL),
        speculative_config={
            "method": "free",
            "exit_layer": int(sys.argv[2]) if len(sys.argv) > 2 else None,
        },
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        disable_log_stats=False,
    )
    answer = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=96))[0]
    print(PROMPT + answer.outputs[0].text)
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:accel_"):
            print(metric.name, metric.labels, metric.value)
