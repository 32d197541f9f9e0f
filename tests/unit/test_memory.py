import pytest

from vllm_accel import ConfigError
from vllm_accel.gating import memory
from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.goodput import Goodput
from vllm_accel.gating.memory import GateMemory


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(memory, "_FIRST_S", 0.0)
    monkeypatch.setattr(memory, "_INTERVAL_S", 0.0)


def taught():
    gate = Goodput(4)
    for _ in range(20):
        gate.observe(StepShape(1, 1), 0.004)
    return gate


def test_a_gate_starts_from_what_another_wrote(tmp_path, always_due):
    file = tmp_path / "gate.json"
    old, new = taught(), Goodput(4)
    GateMemory(file, writes=True).save_when_due(old)
    GateMemory(file, writes=True).restore(new)
    assert new.cost.seconds(StepShape(1, 1)) == old.cost.seconds(StepShape(1, 1))
    assert [f.name for f in tmp_path.iterdir()] == ["gate.json"]


def test_a_missing_file_is_a_cold_start(tmp_path):
    GateMemory(tmp_path / "none.json", writes=True).restore(Goodput(4))


def test_a_reader_never_writes(tmp_path, always_due):
    GateMemory(tmp_path / "gate.json", writes=False).save_when_due(taught())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_a_warning(tmp_path, always_due, caplog):
    GateMemory(tmp_path / "gone" / "gate.json", writes=True).save_when_due(taught())
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cost": 1}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "gate.json").write_text(text)
    with pytest.raises(ConfigError):
        GateMemory(tmp_path / "gate.json", writes=False).restore(Goodput(4))
