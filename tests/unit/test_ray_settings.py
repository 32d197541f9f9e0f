"""Settings of replicas on Ray, and what follows from them; needs no Ray."""

import json
import os

import pytest

from vllm_accel import ConfigError, preload
from vllm_accel.ray import cluster, settings
from vllm_accel.ray.app import serving_args
from vllm_accel.ray.settings import ReplicaSettings


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of eight cores with a vLLM for CPU and a clean environment."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(preload, "is_cpu_build", lambda: True)
    for name in [n for n in os.environ if n.startswith(("VLLM_", "HF_HUB"))]:
        monkeypatch.delenv(name)


def replicas(**more):
    return ReplicaSettings.from_mapping({"model": "m", **more})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replica": 2}, "did you mean 'replicas'"),
        ({"replicas": 0}, "ray.replicas=0 is out of range"),
        ({"replicas": "two"}, "ray.replicas='two'"),
        ({"replicas": True}, "ray.replicas=True"),
        ({"threads": 0}, "ray.threads=0"),
        ({"model": 3}, "ray.model=3 is a int"),
        ({"accelerator": "tpu"}, "expected cpu or gpu"),
        ({"engine_args": []}, "ray.engine_args=[] is a list"),
        ({"engine_args": {"model": "x"}}, "use 'model'"),
        ({"engine_args": {"served_model_name": "x"}}, "use 'name'"),
        ({"speculative_config": "cerberos"}, "'cerberos' is not one of"),
        ({"speculative_config": {"method": "cerberus", "gat": 1}}, "did you mean 'gate'"),
        ({"lazyllm": {"kep": 0.5}}, "did you mean 'keep'"),
        ({"engine_args": {"tensor_parallel_size": "two"}}, "tensor_parallel_size='two'"),
        ({"lazyllm": {}, "speculative_config": "free"}, "expected cerberus, or no"),
        ({"share_gate": True}, "no gate that learns"),
        (
            {
                "share_gate": True,
                "speculative_config": {"method": "cerberus", "gate": "never"},
            },
            "no gate that learns",
        ),
        (
            {
                "share_gate": True,
                "speculative_config": {"method": "cerberus", "gate_state": "f"},
            },
            "a gate_state of its own",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(given, said):
    with pytest.raises(ConfigError) as refusal:
        replicas(**given)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_is_needed():
    with pytest.raises(ConfigError, match="no model"):
        ReplicaSettings.from_mapping({"replicas": 2})


def test_vllms_own_methods_pass():
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    assert replicas(speculative_config=ngram).engine_kwargs()["speculative_config"] == ngram


def test_methods_ride_in_engine_arguments():
    more = {"additional_config": {"mine": 1}, "max_model_len": 64}
    given = replicas(speculative_config="cerberus")
    assert given.engine_kwargs()["speculative_config"] == "cerberus"
    kwargs = replicas(lazyllm={"keep": 0.5}, engine_args=more).engine_kwargs()
    assert kwargs["additional_config"] == {"mine": 1, "lazyllm": {"keep": 0.5}}
    assert kwargs["max_model_len"] == 64
    assert more["additional_config"] == {"mine": 1}


def test_folders_are_named_in_full(tmp_path, monkeypatch):
    (tmp_path / "model" / "heads").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    spec = {"method": "cerberus", "model": "model/heads"}
    given = ReplicaSettings(model="model", speculative_config=spec)
    assert given.model_source == str(tmp_path / "model")
    assert given.served_name == "model"
    heads = given.engine_kwargs()["speculative_config"]["model"]
    assert heads == str(tmp_path / "model" / "heads")
    assert ReplicaSettings(model="org/hub-id").model_source == "org/hub-id"


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, 8),
        ({"replicas": 2}, 4),
        ({"replicas": 3}, 2),
        ({"replicas": 16}, 1),
        ({"replicas": 2, "engine_args": {"tensor_parallel_size": 2}}, 2),
        ({"replicas": 2, "threads": 3}, 3),
    ],
)
def test_replicas_on_cpu_divide_the_cores(given, threads):
    given = replicas(**given)
    assert given.worker_threads == threads
    assert given.env_vars()["OMP_NUM_THREADS"] == str(threads)
    assert given.env_vars()["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8])
def test_what_is_set_aside_for_divided_cores_leaves_room_for_tasks(number):
    kind, needed, _ = cluster.demand(replicas(replicas=number))
    assert kind == "CPU"
    assert needed + 0.2 <= 8


def test_a_cluster_too_small_is_refused_before_waiting():
    given = replicas(replicas=3, threads=4)
    with pytest.raises(ConfigError, match=r"3 replicas need 10\.9 CPU and Ray has 8"):
        cluster.check_fits(given, {"CPU": 8.0})
    cluster.check_fits(given, {"CPU": 12.0})
    gpus = replicas(replicas=2, accelerator="gpu")
    with pytest.raises(ConfigError, match="need 2 GPU and Ray has 0"):
        cluster.check_fits(gpus, {"CPU": 8.0})


def test_memory_is_divided_unless_it_is_said():
    assert replicas(replicas=2).engine_kwargs()["gpu_memory_utilization"] == 0.35
    said = replicas(replicas=2, engine_args={"kv_cache_memory_bytes": 1})
    assert "gpu_memory_utilization" not in said.engine_kwargs()
    space = replicas(env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert "gpu_memory_utilization" not in space.engine_kwargs()


def test_on_gpu_nothing_of_this_is_touched():
    given = replicas(replicas=2, accelerator="gpu")
    assert given.env_vars() == {}
    assert given.engine_kwargs() == {}
    config = serving_args(given)["llm_configs"][0]
    assert config["accelerator_config"] == {"kind": "gpu"}
    assert config["placement_group_config"] is None
    assert "ray_actor_options" not in config["deployment_config"]


def test_the_machines_vllm_chooses_the_accelerator(monkeypatch):
    assert replicas().on_cpu
    monkeypatch.setattr(preload, "is_cpu_build", lambda: False)
    assert not replicas().on_cpu
    assert replicas(accelerator="cpu").on_cpu


def test_the_users_environment_wins(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "1")
    monkeypatch.setenv("SECRET", "s")
    env = replicas(env={"VLLM_CPU_ATTN_SPLIT_KV": "0"}).env_vars()
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert env["VLLM_CPU_ATTN_SPLIT_KV"] == "0"
    assert "SECRET" not in env


def test_openmp_and_allocator_are_preloaded(monkeypatch):
    monkeypatch.setattr(settings, "with_preloads", lambda _: {"LD_PRELOAD": "/lib.so"})
    assert replicas().env_vars()["LD_PRELOAD"] == "/lib.so"


def test_the_app_is_plain_json_with_our_classes():
    app = serving_args(replicas(replicas=2, speculative_config="cerberus", name="tiny"))
    assert json.loads(json.dumps(app)) == app
    config = app["llm_configs"][0]
    assert config["model_loading_config"] == {"model_id": "tiny", "model_source": "m"}
    assert config["server_cls"] == "vllm_accel.ray.server:FastFailServer"
    assert config["deployment_config"]["num_replicas"] == 2
    ingress = app["ingress_cls_config"]["ingress_cls"]
    assert ingress == "vllm_accel.ray.ingress:RetryingIngress"


def test_engine_processes_and_ray_tasks_fit_the_two_cores_of_a_small_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    given = replicas(replicas=2)
    assert given.worker_threads == 1
    cluster.check_fits(given, {"CPU": 2.0})
    assert cluster.demand(given)[1] == 1.3
