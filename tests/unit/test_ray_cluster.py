"""Finding a Ray, fitting into it, and saying why it did not start; with no Ray at all."""

import socket
import sys
from types import SimpleNamespace

import pytest

from vllm_accel import ConfigError, UnsupportedHost
from vllm_accel.ray import cluster, serving
from vllm_accel.ray.cluster import Where
from vllm_accel.ray.settings import ReplicaSettings

REPORT = """Deploying application vllm_accel failed: Failed to update the deployments:
The deployment failed to start 2 times in a row. Error:
ray::ServeReplica:vllm_accel:FastFailServer.initialize_and_get_metadata() (pid=7)
  File "/site/ray/serve/_private/replica.py", line 1, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/site/ray/llm/vllm_engine.py", line 1, in _get_vllm_engine_config
    raise RuntimeError(f"Failed to create vLLM engine config: {e}") from None
RuntimeError: Failed to create vLLM engine config: Heads x are missing: expected a folder.
"""


@pytest.fixture
def ray(monkeypatch):
    """A module `ray` with two nodes of four cores, that remembers how it was asked."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    asked = {}
    fake = SimpleNamespace(
        asked=asked,
        init=lambda **given: asked.update(given),
        shutdown=lambda: asked.update(down=True),
        nodes=lambda: nodes,
        cluster_resources=lambda: {"CPU": 8.0},
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def replicas(number, **more):
    return ReplicaSettings(model="m", replicas=number, accelerator="cpu", **more)


@pytest.mark.parametrize(("number", "threads"), [(1, 4), (2, 4), (3, 2), (4, 2), (8, 1)])
def test_workers_divide_the_cluster_and_stay_on_a_node(ray, number, threads):
    assert cluster.fitted(replicas(number)).threads == threads


def test_what_is_said_is_kept_and_what_does_not_fit_is_refused(ray):
    assert cluster.fitted(replicas(2, threads=1)).threads == 1
    with pytest.raises(ConfigError, match="lower --replicas or --threads"):
        cluster.fitted(replicas(20))


def test_a_ray_of_our_own_is_taken_down(ray):
    with cluster.connected(Where(metrics_port=8090)):
        assert ray.asked["address"] == "local"
        assert ray.asked["_metrics_export_port"] == 8090
    assert ray.asked["down"]


def test_a_cluster_is_joined_by_option_or_environment(ray, monkeypatch):
    with cluster.connected(Where(address="auto", metrics_port=8090)):
        assert ray.asked["address"] == "auto"
        assert "_metrics_export_port" not in ray.asked
    with socket.create_server(("127.0.0.1", 0)) as node:
        address = f"127.0.0.1:{node.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with cluster.connected(Where()):
            assert ray.asked["address"] == address


def test_an_address_where_nobody_answers_is_said_before_ray_tries(ray):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with (
        pytest.raises(UnsupportedHost, match=f"Nobody answers at {address}"),
        cluster.connected(Where(address=address)),
    ):
        pass
    assert "address" not in ray.asked


def test_a_cluster_that_is_not_there_is_one_sentence(ray):
    def fail(**_):
        raise ConnectionError("tried\n\nnobody answers\n")

    ray.init = fail
    with (
        pytest.raises(UnsupportedHost, match=r"\(nobody answers\)") as refusal,
        cluster.connected(Where(address="auto")),
    ):
        pass
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        (["Failed to update", REPORT], REPORT.splitlines()[-1]),
        ([REPORT, ""], REPORT.splitlines()[-1]),
        (["it did\nnot start\n"], "not start"),
        ([""], "no reason given"),
    ],
)
def test_the_reason_of_a_failed_start_is_found_in_serves_reports(reports, line):
    assert serving.reason(reports) == line


def test_an_error_inside_the_block_is_not_taken_for_a_missing_cluster(ray):
    with pytest.raises(ValueError, match="ours"), cluster.connected(Where()):
        raise ValueError("ours")
    assert ray.asked["down"]


def test_a_cluster_named_by_the_environment_is_somebodys_too(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert Where().cluster == "auto", "what runs there must not be shut down"
    assert Where(address="other:6379").cluster == "other:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert Where().cluster is None
