"""Our counters on their way to Ray, and the dashboard that asks for them."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.samples import Sample

from vllm_accel.ray.counters import CounterExport, accel_samples, ray_name

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"
DECISIONS = "vllm:accel_gate_decisions_total"


MADE = {}


class Told:
    """Stands for `ray.util.metrics.Counter`, and keeps what it was told."""

    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.series = tag_keys, {}
        MADE[name] = self

    def inc(self, value, tags):
        assert value > 0
        assert set(tags) == set(self.tag_keys)
        key = tuple(sorted(tags.items()))
        self.series[key] = self.series.get(key, 0) + value


@pytest.fixture
def export():
    MADE.clear()
    return CounterExport("replica-1", Told)


def decisions(state, value):
    return Sample(DECISIONS, {"state": state, "reason": "goodput"}, value)


def test_what_was_gained_is_added(export):
    for count in (3.0, 3.0, 5.0):
        export.add([decisions("open", count), decisions("closed", 1.0)])
    series = MADE["vllm_accel_gate_decisions"].series
    assert sorted(series.values()) == [1.0, 5.0]
    assert all(("ReplicaId", "replica-1") in key for key in series)


def test_a_counter_at_zero_stays_unknown(export):
    export.add([decisions("open", 0.0)])
    assert MADE == {}


def test_labels_that_share_a_value_are_told_apart(export):
    pairs = [{"state": "a", "reason": "b"}, {"state": "b", "reason": "a"}]
    export.add([Sample(DECISIONS, labels, 1.0) for labels in pairs])
    assert len(MADE["vllm_accel_gate_decisions"].series) == 2


def test_names_are_as_ray_wants_them():
    assert ray_name(DECISIONS) == "vllm_accel_gate_decisions"


@pytest.fixture(scope="module")
def grafana():
    spec = importlib.util.spec_from_file_location("make", GRAFANA / "make_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exported(export, monkeypatch, tmp_path):
    """(names at a plain /metrics, names on Ray's port) after every counter has counted."""
    metrics = pytest.importorskip("vllm_accel.host.metrics")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    metrics.open_reader()
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0),
        model_config=SimpleNamespace(served_model_name="m"),
    )
    file = metrics.CounterFile(config, "cerberus")
    for name in metrics.HELP:
        file.add(name, 1.0)
    file.write(busy=False)
    samples = list(accel_samples())
    export.add(samples)
    return {s.name for s in samples}, {f"ray_{name}_total" for name in MADE}


def names_asked_for(dashboard, ref):
    text = [
        t["expr"] for p in dashboard["panels"] for t in p["targets"] if t["refId"] == ref
    ]
    words = " ".join(text).replace("(", " ").replace("{", " ").split()
    return {word for word in words if "accel_" in word}


def test_the_dashboard_asks_for_every_name_that_is_exported_and_no_other(exported):
    dashboard = json.loads((GRAFANA / "vllm_accel.json").read_text())
    plain, ray = exported
    assert names_asked_for(dashboard, "A") == plain
    assert names_asked_for(dashboard, "B") == ray


def test_the_dashboard_is_what_its_script_makes(grafana):
    made = grafana.dashboard(grafana.names())
    assert json.loads((GRAFANA / "vllm_accel.json").read_text()) == made, (
        "run python docs/grafana/make_dashboard.py"
    )


def test_panels_do_not_overlap(grafana):
    places = [p["gridPos"] for p in grafana.dashboard(grafana.names())["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
