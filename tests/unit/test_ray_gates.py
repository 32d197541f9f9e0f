"""Sharing what gates learn: merging, the board, one replica's side of it."""

import asyncio
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray")

from ray.exceptions import RaySystemError

from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.goodput import Goodput
from vllm_accel.ray import gate_sharing
from vllm_accel.ray.gate_sharing import GateBoard, SharedGate, board_key, merged

PLAIN = StepShape(1, 1)


def gate(plain):
    learnt = Goodput(4)
    for _ in range(64):
        learnt.observe(PLAIN, plain)
    return learnt.state_dict()


def test_one_state_merges_to_itself():
    state = json.loads(json.dumps(gate(0.004)))
    same = json.loads(json.dumps(merged([state])))
    assert same.keys() == state.keys()
    assert same["cost"] == state["cost"]
    np.testing.assert_allclose(
        same["before"]["weights"], state["before"]["weights"], atol=1e-9
    )


def test_a_merged_state_starts_a_gate():
    new = Goodput(4)
    new.load_state_dict(json.loads(json.dumps(merged([gate(0.004), gate(0.006)]))))
    (seconds,) = new.cost.seconds(PLAIN)
    assert 0.0039 < seconds < 0.0061


def test_a_state_of_another_make_drops_out():
    assert merged([{"other": 1}, {"usual": 0.2}, {"usual": 0.4}]) == {
        "usual": pytest.approx(0.3)
    }


def test_the_board_keeps_the_newest_of_each_and_few_in_all():
    board = GateBoard()
    assert board.merged() is None
    for n in range(2 * gate_sharing.KEEP):
        board.publish("first", {"usual": 1.0})
        board.publish(f"replica-{n}", {"usual": 0.0})
    assert len(board._states) == gate_sharing.KEEP
    share = board.merged()["usual"]
    assert share == pytest.approx(1 / gate_sharing.KEEP)


def test_boards_are_of_a_model_and_its_settings():
    keys = {
        board_key("m", "cerberus"),
        board_key("n", "cerberus"),
        board_key("m", {"method": "cerberus", "model": "heads"}),
    }
    assert len(keys) == 3
    assert board_key("m", "cerberus") in keys


def test_the_board_is_in_no_replicas_placement_group(tmp_path, config, monkeypatch):
    """Serve ends a replica's group with it."""
    asked = {}

    class Actor:
        def options(self, **options):
            asked.update(options)
            return SimpleNamespace(remote=lambda: None)

    monkeypatch.setattr(gate_sharing.tempfile, "gettempdir", lambda: tmp_path)
    monkeypatch.setattr(gate_sharing.ray, "remote", lambda _: Actor())
    SharedGate.join(config, 0, "a")
    assert asked["scheduling_strategy"] == "DEFAULT"
    assert asked["name"] == board_key("m", {"method": "cerberus"})


class Remote:
    """A board as its handle: every method is asked with `.remote`, and may fail."""

    def __init__(self, board, fails=False):
        for name in ("publish", "merged"):
            setattr(self, name, SimpleNamespace(remote=self._asked(board, name, fails)))

    def _asked(self, board, name, fails):
        async def ask(*arguments):
            if fails:
                raise RaySystemError("no board")
            return getattr(board, name)(*arguments)

        return ask


@pytest.fixture
def config():
    return SimpleNamespace(
        model_id="m", engine_kwargs={"speculative_config": {"method": "cerberus"}}
    )


def test_the_first_replica_starts_cold_and_the_second_warm(tmp_path, config):
    board = GateBoard()
    first = SharedGate(Remote(board), "a", tmp_path / "0.json")
    second = SharedGate(Remote(board), "b", tmp_path / "1.json")
    named = asyncio.run(first.starting_point(config))["speculative_config"]
    assert named == {"method": "cerberus", "gate_state": str(tmp_path / "0.json")}
    assert not (tmp_path / "0.json").exists()
    (tmp_path / "0.json").write_text(json.dumps(gate(0.004)))
    asyncio.run(first.publish())
    asyncio.run(second.starting_point(config))
    warm = Goodput(4)
    warm.load_state_dict(json.loads((tmp_path / "1.json").read_text()))
    assert warm.cost.seconds(PLAIN)[0] == pytest.approx(0.004, rel=0.01)


def test_only_what_the_gate_wrote_itself_is_published(tmp_path, config):
    board = GateBoard()
    board.publish("old", gate(0.004))
    replica = SharedGate(Remote(board), "new", tmp_path / "0.json")
    asyncio.run(replica.starting_point(config))
    asyncio.run(replica.publish())
    assert list(board._states) == ["old"]
    written = (tmp_path / "0.json").stat().st_mtime + 1
    os.utime(tmp_path / "0.json", (written, written))
    asyncio.run(replica.publish())
    asyncio.run(replica.publish())
    assert list(board._states) == ["old", "new"]


def test_a_bare_name_becomes_a_mapping(tmp_path, config):
    config.engine_kwargs["speculative_config"] = "cerberus"
    replica = SharedGate(Remote(GateBoard()), "a", tmp_path / "0.json")
    named = asyncio.run(replica.starting_point(config))["speculative_config"]
    assert named["method"] == "cerberus"


def test_without_its_board_a_replica_starts_cold_and_serves(tmp_path, config, caplog):
    replica = SharedGate(Remote(None, fails=True), "a", tmp_path / "0.json")
    asyncio.run(replica.starting_point(config))
    (tmp_path / "0.json").write_text("{}")
    asyncio.run(replica.publish())
    assert not replica._file.with_suffix(".partial").exists()
