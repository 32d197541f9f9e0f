"""Bad configs end at start-up with one sentence; on the command line with exit code 2."""

import json
import re
import sys
from pathlib import Path

import pytest

from vllm_accel.testing import (
    write_tiny_model,
    write_untrained_exit,
    write_untrained_heads,
)

pytestmark = pytest.mark.engine

TRY_ALL = """
import json, sys
from vllm.engine.arg_utils import EngineArgs

said = {}
for name, arguments in json.load(sys.stdin).items():
    try:
        EngineArgs(
            enforce_eager=True, skip_tokenizer_init=True, **arguments
        ).create_engine_config()
        said[name] = ["", "accepted"]
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
print("RESULT", json.dumps(said))
"""

CERBERUS = {"method": "cerberus"}
FREE = {"method": "free", "exit_layer": 1}
FOREIGN_SCHEDULER = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
FOREIGN_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"

CASES = {
    "lazyllm": ({"spec_method": "lazyllm"}, "use --additional-config"),
    "key": ({"speculative_config": CERBERUS | {"gats": 1}}, "did you mean 'gate'"),
    "gate": ({"speculative_config": CERBERUS | {"gate": "x"}}, "is not a gate"),
    "gate path": (
        {"speculative_config": CERBERUS | {"gate": "no.such.gate"}},
        "cannot be made",
    ),
    "drafts": (
        {"speculative_config": CERBERUS | {"num_speculative_tokens": 9}},
        "expected 1..4",
    ),
    "twice": (
        {"speculative_config": CERBERUS, "spec_method": "cerberus"},
        "given twice",
    ),
    "our key, no method": (
        {"speculative_config": {"gate": "never", "num_speculative_tokens": 4}},
        "no method is named",
    ),
    "a key of free's, no method": (
        {"speculative_config": {"exit_layer": 1}},
        "add --speculative-config.method free",
    ),
    "no heads": (
        {"speculative_config": CERBERUS | {"model": "/no/such/folder"}},
        "neither a folder nor a repository",
    ),
    "worker": (
        {"speculative_config": CERBERUS, "worker_cls": FOREIGN_WORKER},
        "derives from vllm_accel.host.v1.cpu_worker.AccelCPUWorker",
    ),
    "scheduler": (
        {"speculative_config": CERBERUS, "scheduler_cls": FOREIGN_SCHEDULER},
        "derives from vllm_accel.host.v1.scheduler.AccelScheduler",
    ),
    "no such scheduler": (
        {"speculative_config": CERBERUS, "scheduler_cls": "no.such.Scheduler"},
        "derives from vllm_accel.host.v1.scheduler.AccelScheduler",
    ),
    "lora": ({"speculative_config": CERBERUS, "enable_lora": True}, "with LoRA"),
    "pipeline": (
        {"speculative_config": CERBERUS, "pipeline_parallel_size": 2},
        "pipeline parallelism",
    ),
    "connector": (
        {
            "speculative_config": CERBERUS,
            "kv_transfer_config": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
            },
        },
        "KV connectors",
    ),
    "free without an exit": ({"speculative_config": "free"}, "has no folder 'free'"),
    "exit outside": (
        {"speculative_config": FREE | {"exit_layer": 2}},
        "not inside the model: expected 1..1",
    ),
    "mode": (
        {"speculative_config": FREE | {"mode": "fast"}},
        "free.mode='fast' is not a mode",
    ),
    "gate of the other": (
        {"speculative_config": FREE | {"gate": "entropy"}},
        "free.gate='entropy' is not a gate",
    ),
    "no such exit": (
        {"speculative_config": FREE | {"model": "/no/such/folder"}},
        "neither a folder nor a repository",
    ),
    "tensor parallel": (
        {"speculative_config": FREE, "tensor_parallel_size": 2},
        "free does not work with tensor parallelism",
    ),
    "async": (
        {"speculative_config": CERBERUS, "async_scheduling": True},
        "async scheduling",
    ),
    "processors": (
        {"speculative_config": CERBERUS, "logits_processors": ["a.b:C"]},
        "logits processors",
    ),
}


def lazily(**settings):
    return {"additional_config": {"lazyllm": settings}}


LAZY = lazily(prune_after=[1])
CASES |= {
    "lazyllm, key": (lazily(kep=1), "did you mean 'keep'"),
    "lazyllm, keep": (lazily(keep=0), "lazyllm.keep=0 is out of range"),
    "lazyllm, no settings": (
        {"additional_config": {"lazyllm": True}},
        "expected a mapping",
    ),
    "lazyllm, points": (lazily(prune_after=[2]), "is not inside the model"),
    "lazyllm, small model": (lazily(), "at least 3 layers"),
    "lazyllm, ngram": (
        LAZY | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "lazyllm does not work with vLLM's own speculative decoding",
    ),
    "lazyllm, free": (
        LAZY | {"speculative_config": {"method": "free", "exit_layer": 1}},
        "lazyllm does not work with free",
    ),
    "lazyllm, groups": (LAZY | {"disable_hybrid_kv_cache_manager": True}, "hybrid manager"),
    "lazyllm, lora": (LAZY | {"enable_lora": True}, "LoRA"),
    "lazyllm, async": (LAZY | {"async_scheduling": True}, "async scheduling"),
    "lazyllm, scheduler": (LAZY | {"scheduler_cls": FOREIGN_SCHEDULER}, "of your own"),
    "lazyllm, pipeline": (LAZY | {"pipeline_parallel_size": 2}, "pipeline parallelism"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with its heads beside it."""
    folder = write_tiny_model(tmp_path_factory.mktemp("refusals") / "model")
    write_untrained_heads(folder / "cerberus", folder)
    return folder


@pytest.fixture(scope="module")
def said(run_python, model, tmp_path_factory):
    wide = write_tiny_model(tmp_path_factory.mktemp("wide") / "m", hidden_size=128)
    heads = write_untrained_heads(wide / "cerberus", wide)
    cases = {name: arguments for name, (arguments, _) in CASES.items()}
    cases["width"] = {"speculative_config": CERBERUS | {"model": str(heads)}}
    cases["ngram"] = {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
    }
    cases["ours"] = {"speculative_config": "cerberus"}
    exit_ = write_untrained_exit(wide / "free", wide)
    cases["exit width"] = {"speculative_config": {"method": "free", "model": str(exit_)}}
    cases["free"] = {"speculative_config": FREE}
    cases["free by name"] = {"speculative_config": "free", "model": str(wide)}
    cases["lazy"] = LAZY
    cases = {name: {"model": str(model)} | args for name, args in cases.items()}
    done = run_python(["-c", TRY_ALL], text=json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(s for s in done.stdout.splitlines() if s.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_work_is_refused_in_one_sentence(said, name):
    kind, message = said[name]
    assert kind in ("ConfigError", "CheckpointError", "UnsupportedHost")
    assert CASES[name][1] in message
    assert "expected" in message
    assert "\n" not in message


def test_heads_of_another_width_are_refused(said):
    assert re.search("hidden_size=128, the model .* has 64", said["width"][1])


def test_vllms_own_methods_and_ours_are_accepted(said):
    ours = {said[name][1] for name in ("ngram", "ours", "free", "free by name", "lazy")}
    assert ours == {"accepted"}


def test_an_exit_of_another_model_is_refused(said):
    assert "expected the same weights" in said["exit width"][1]


VLLM = Path(sys.executable).with_name("vllm")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--speculative-config", "lazyllm"], "use --additional-config"),
        (["--speculative-config", "free"], "has no folder 'free'"),
        (["-sc", '{"method": "cerberus", "gate": "x"}'], "is not a gate"),
        (["--spec-method", "cerberus", "--spec-tokens", "9"], "expected 1..4"),
        (["--additional-config", '{"lazyllm": {"keep": 2}}'], "lazyllm.keep=2"),
    ],
)
def test_vllm_serve_ends_with_one_line_and_exit_code_2(
    run_python, model, options, sentence
):
    serve = [VLLM, "serve", model, "--skip-tokenizer-init", "--enforce-eager"]
    done = run_python([*serve, *options])
    assert done.returncode == 2, done.stderr[-3000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("vllm: error: ")
    assert sentence in line
    assert "Traceback" not in done.stderr
