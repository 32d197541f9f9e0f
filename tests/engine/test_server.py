"""`vllm serve` with the real client: completions, chat, streaming, /metrics."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.engine

EDIT = Path(__file__).parents[2] / "examples" / "reference_model" / "edit"
VLLM = Path(sys.executable).with_name("vllm")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(model, log, *options):
    """Base URL of a running server."""
    port = free_port()
    command = [VLLM, "serve", model, "--port", port, "--enforce-eager", *options]
    command += ["--max-model-len", 512, "--kv-cache-memory-bytes", 2**27]
    environment = os.environ | {"VLLM_CPU_ATTN_SPLIT_KV": "0", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=out, env=environment
        )
        try:
            wait_until_healthy(server, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_until_healthy(server, port, log):
    import httpx

    for _ in range(600):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def counters(url):
    """{name: sum over labels} of the counters at /metrics."""
    import httpx

    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def complete(client, model, prompt):
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=48, temperature=0
    )
    return answer.choices[0].text, answer.usage.completion_tokens


def stream(client, model, prompt):
    parts = client.completions.create(
        model=model, prompt=prompt, max_tokens=48, temperature=0, stream=True
    )
    return "".join(part.choices[0].text for part in parts)


def test_final_tokens_are_counted_in_the_response_also_before_a_stop_string(tmp_path):
    from openai import OpenAI

    model = str(EDIT)
    lines = (EDIT.parent / "prompts" / "edits.jsonl").read_text().splitlines()
    prompt = json.loads(lines[0])["prompt"]
    config = json.dumps({"method": "free", "mode": "exit", "threshold": 0.9})
    with served(model, tmp_path / "log", "--speculative-config", config) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")

        def final(asked, **more):
            answer = client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=96,
                temperature=0,
                extra_body={"vllm_xargs": asked},
                **more,
            )
            reason, made = answer.choices[0].finish_reason, answer.kv_transfer_params
            return reason, made and made["vllm_accel"]["final_tokens"]

        whole = final({"accel_report": 1})
        stopped = final({"accel_report": 1}, stop=["seconds"])
        assert whole[0] == "length"
        assert stopped[0] == "stop"
        assert 0 < stopped[1] < whole[1] < 96
        assert final({"accel_report": 1, "early_exit": "false"})[1] == 0
        assert final({})[1] is None
        seen = counters(url)
    assert seen["vllm:accel_final_tokens_total"] >= whole[1] + stopped[1]


def test_completions_chat_streaming_and_metrics(
    reference_model, reference_prompts, generate, tmp_path
):
    """Two API servers, to see that counters reach both; examples/ start one."""
    from openai import OpenAI

    prompts = [ids[:60] for ids in reference_prompts[:3]]
    sampling = {"temperature": 0.0, "max_tokens": 48}
    plain = generate(
        {"model": reference_model, "dtype": "float32"},
        [{"prompts": prompts, "sampling": [sampling] * 3}],
    )["batches"][0]
    # In bfloat16 some CPUs round three requests at once otherwise than one.
    options = ["--speculative-config", "cerberus", "--api-server-count", "2"]
    options += ["--dtype", "float32"]
    with served(reference_model, tmp_path / "log", *options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answers = [complete(client, reference_model, p) for p in prompts]
        assert [text for text, _ in answers] == [r["text"] for r in plain]
        given = sum(tokens for _, tokens in answers)
        for seen in [counters(url) for _ in range(4)]:
            assert seen["vllm:accel_output_tokens_total"] == given
            steps = seen["vllm:accel_request_steps_total"]
            assert steps < given <= steps + seen["vllm:accel_accepted_tokens_total"]
        assert [stream(client, reference_model, p) for p in prompts] == [
            text for text, _ in answers
        ]
        chat = client.chat.completions.create(
            model=reference_model,
            messages=[{"role": "user", "content": "def main():"}],
            max_tokens=16,
            temperature=0,
        )
        assert chat.usage.completion_tokens > 0
        # Read while it serves: stopped, vLLM may log the death of the engine it killed.
        log = (tmp_path / "log").read_text()
    assert "cerberus is on" in log
    assert "Traceback" not in log
