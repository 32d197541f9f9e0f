import math
from itertools import pairwise

import pytest
import torch

from vllm_accel import ConfigError
from vllm_accel.gating.benefit import Benefit
from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.policy import EntropyThreshold, make_gate
from vllm_accel.gating.signals import (
    DraftSignals,
    Signals,
    confidence,
    entropy,
    margin,
)
from vllm_accel.testing import RandomGate


def test_entropy_of_a_uniform_distribution_is_its_logarithm():
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2)


def test_entropy_ignores_forbidden_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    assert entropy(logits).item() == pytest.approx(math.log(2))


def test_raising_the_threshold_never_admits_fewer():
    torch.manual_seed(0)
    signals = Signals(torch.randn(50, 20) * 3, range(50))
    admitted = [
        set(
            torch.tensor(EntropyThreshold(nats).admit(signals)).nonzero().flatten().tolist()
        )
        for nats in (0.1, 0.5, 1.0, 2.0, 3.0)
    ]
    assert all(low <= high for low, high in pairwise(admitted))
    assert len(admitted[0]) < len(admitted[-1])


@pytest.mark.parametrize(("name", "open_"), [("always", True), ("never", False)])
def test_constant_gates_do_not_look_at_signals(name, open_):
    signals = Signals(torch.zeros(3, 4), range(3))
    assert (
        make_gate(name, draft_tokens=4, entropy_threshold=1.0).admit(signals) == [open_] * 3
    )
    assert "entropy" not in vars(signals)


def test_a_gate_may_come_from_a_dotted_path():
    gate = make_gate("vllm_accel.testing:RandomGate", draft_tokens=4, entropy_threshold=1.0)
    assert isinstance(gate.gate, RandomGate)


@pytest.mark.parametrize("path", ["no.such.module", "os.path", "collections.OrderedDict"])
def test_a_path_that_is_no_gate_is_refused(path):
    with pytest.raises(ConfigError, match=r"Gate .* (cannot be made|is not a gate)"):
        make_gate(path, draft_tokens=4, entropy_threshold=1.0)


def test_benefit_is_over_what_plain_steps_would_give():
    benefit = Benefit()
    for _ in range(40):
        benefit.add(StepShape(5, 1, 0, 1), tokens=3, seconds=0.02)
    assert benefit.ratio() is None  # nobody knows yet what a plain step takes
    for _ in range(40):
        benefit.add(StepShape(1, 1), tokens=1, seconds=0.01)
    assert benefit.ratio() == pytest.approx(1.0, rel=0.05)  # of plain steps
    benefit.add(StepShape(5, 1, 0, 1), tokens=3, seconds=0.02)
    assert benefit.ratio() == pytest.approx(1.5, rel=0.05)


def test_margin_and_confidence_are_probabilities():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log()
    assert margin(logits).tolist() == pytest.approx([0.5, 0.25])
    best = logits.max(dim=-1).values
    assert confidence(logits, best).tolist() == pytest.approx([0.7, 0.5])


def test_a_gate_that_learns_nothing_verifies_whole_drafts():
    gate = make_gate("always", draft_tokens=4, entropy_threshold=1.0)
    assert gate.lengths(DraftSignals(torch.zeros(4, 2))) == [4, 4]
