"""Two replicas with cerberus behind one endpoint, through the real OpenAI client."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TOKENS = 32
MUST_COUNT = {
    f"ray_vllm_accel_{name}_total"
    for name in (
        "gate_decisions",
        "draft_length",
        "drafted_tokens",
        "accepted_tokens",
        "draft_seconds",
        "request_steps",
        "output_tokens",
    )
}

# Every vLLM process loads general plugins; this one tells of each what it finds there.
REPORTER = """
import json, os, pathlib, threading

def register():
    timer = threading.Timer(2.0, report)
    timer.daemon = True
    timer.start()

def report():
    import vllm_accel
    from vllm.engine.arg_utils import EngineArgs
    title = pathlib.Path("/proc/self/cmdline").read_text().replace(chr(0), " ")
    door = hasattr(EngineArgs.create_speculative_config, "vllm_accel_original")
    said = {"title": title, "door_is_open": door, "package": vllm_accel.__file__}
    pathlib.Path(os.environ["ACCEL_REPORTS"], f"{os.getpid()}.json").write_text(
        json.dumps(said)
    )
"""


@pytest.fixture(scope="module")
def reporter(tmp_path_factory):
    """Folder of an installed plugin that reports to its subfolder `reports`."""
    folder = tmp_path_factory.mktemp("reporter")
    (folder / "reports").mkdir()
    (folder / "accel_reporter.py").write_text(REPORTER)
    info = folder / "accel_reporter-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: accel-reporter\nVersion: 0"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\naccel_reporter = accel_reporter:register\n"
    )
    return folder


@pytest.fixture(scope="module")
def served(serve, reporter, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    config = json.dumps({"method": "cerberus", "gate": "always"})
    path = os.pathsep.join([str(reporter), str(ROOT)])
    options = ["--speculative-config", config, "--env", f"PYTHONPATH={path}"]
    options += ["--env", f"ACCEL_REPORTS={reporter / 'reports'}"]
    with serve(log, *options) as command:
        yield command


@pytest.fixture(scope="module")
def client(served):
    from openai import OpenAI

    return OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)


def complete(client, prompt, **more):
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model="reference",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        extra_body=extra,
        **more,
    )


def chat(client, content, **more):
    return client.chat.completions.create(
        model="reference",
        messages=[{"role": "user", "content": content}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )


def test_tokens_are_the_offline_engines(client, prompts, offline, tokenizer):
    plain = offline([tokenizer(prompt).input_ids for prompt in prompts[:8]], TOKENS)
    with ThreadPoolExecutor(4) as pool:  # both replicas are asked
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts[:8]))
    assert [a.choices[0].text for a in answers] == [p["text"] for p in plain]
    assert [a.choices[0].token_ids for a in answers] == [p["token_ids"] for p in plain]
    assert {a.usage.completion_tokens for a in answers} == {TOKENS}


def test_a_streamed_completion_is_the_whole_one(client, prompts):
    for prompt in prompts[:3]:
        parts = list(complete(client, prompt, stream=True))
        whole = complete(client, prompt).choices[0]
        assert "".join(p.choices[0].text for p in parts) == whole.text
        assert parts[-1].choices[0].finish_reason == whole.finish_reason == "length"


def test_chat_streamed_and_whole_is_the_offline_engines(client, offline, tokenizer):
    asked = "Write a function that adds two numbers."
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    (plain,) = offline([ids], TOKENS)
    parts = list(chat(client, asked, stream=True))
    assert chat(client, asked).choices[0].message.content == plain["text"]
    said = [p.choices[0].delta.content or "" for p in parts if p.choices]
    assert "".join(said) == plain["text"]


def test_errors_of_a_request_come_back_as_they_are(client):
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(BadRequestError):
        complete(client, list(range(3, 1000)))


def test_the_plugin_is_in_every_process(served, client, reporter):
    complete(client, "def main():")
    kinds = ("ServeReplica", "VLLM::EngineCore", "VLLM::Worker")

    def told():
        found = [json.loads(f.read_text()) for f in (reporter / "reports").glob("*.json")]
        by_kind = {kind: [r for r in found if kind in r["title"]] for kind in kinds}
        return by_kind if all(len(r) >= 2 for r in by_kind.values()) else None

    by_kind = served.wait_for(told, seconds=60)
    assert {kind: len(found) for kind, found in by_kind.items()} == dict.fromkeys(kinds, 2)
    reports = [r for found in by_kind.values() for r in found]
    assert all(r["door_is_open"] for r in reports)
    assert {r["package"] for r in reports} == {str(ROOT / "vllm_accel" / "__init__.py")}


def counters(url):
    """{name: {ReplicaId: value}} of our counters on Ray's metrics port."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(httpx.get(url).text):
        for sample in family.samples:
            if sample.name.startswith("ray_vllm_accel_") and sample.name.endswith("_total"):
                by_replica = found.setdefault(sample.name, {})
                replica = sample.labels["ReplicaId"]
                by_replica[replica] = by_replica.get(replica, 0) + sample.value
    return found


def test_counters_are_on_rays_port_for_each_replica(served, client, prompts):
    def both():
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda prompt: complete(client, prompt), prompts[:8]))
        found = counters(served.metrics_url)
        whole = all(len(found.get(name, {})) == 2 for name in MUST_COUNT)
        return found if whole else None

    found = served.wait_for(both, seconds=120)
    accepted = sum(found["ray_vllm_accel_accepted_tokens_total"].values())
    drafted = sum(found["ray_vllm_accel_drafted_tokens_total"].values())
    assert 0 < accepted < drafted


def test_the_counters_count_what_clients_get(served, client, prompts):
    name = "ray_vllm_accel_output_tokens_total"

    def settled():
        """The sum, once two looks are alike: Ray exports every few seconds."""
        before = sum(counters(served.metrics_url)[name].values())
        time.sleep(12)
        after = sum(counters(served.metrics_url)[name].values())
        return after if before == after else None

    before = served.wait_for(settled, seconds=120)
    answers = [complete(client, prompt) for prompt in prompts[:4]]
    given = sum(answer.usage.completion_tokens for answer in answers)
    assert served.wait_for(settled, seconds=120) - before == given
