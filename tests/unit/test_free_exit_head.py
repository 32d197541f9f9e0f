"""The exit: adapter, the model's own norm and LM head, and what is read off its logits."""

import pytest
import torch

from vllm_accel.free.exit_head import ADAPTERS, ExitAdapter, ExitHead, ExitSignals
from vllm_accel.gating import signals
from vllm_accel.spans import Lane, Span, view_of
from vllm_accel.toy import ToyDecoder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_untrained_adapter_changes_nothing(kind):
    torch.manual_seed(0)
    states = torch.randn(3, 5, 16)
    assert torch.equal(ExitAdapter(kind, 16, 4)(states), states)


@pytest.mark.parametrize("kind", ["mlp", "low_rank"])
def test_an_adapter_commutes_with_scaling(kind):
    torch.manual_seed(0)
    adapter = ExitAdapter(kind, 16, 4)
    torch.nn.init.normal_(adapter.up.weight)
    states = torch.randn(7, 16)
    assert not torch.allclose(adapter(states), states)
    scaled = adapter(100 * states) / 100
    torch.testing.assert_close(scaled, adapter(states), rtol=1e-4, atol=1e-5)


def test_a_state_of_zeros_stays_finite():
    adapter = ExitAdapter("mlp", 16, 4)
    torch.nn.init.normal_(adapter.up.weight)
    assert adapter(torch.zeros(1, 16)).isfinite().all()


def test_only_the_mlp_is_not_linear_in_direction():
    torch.manual_seed(0)
    for kind, linear in (("mlp", False), ("low_rank", True)):
        adapter = ExitAdapter(kind, 16, 4)
        torch.nn.init.normal_(adapter.up.weight)
        states = torch.randn(7, 16)
        assert torch.allclose(adapter(-states), -adapter(states)) is linear


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_exit_at_full_depth_is_the_model(kind):
    toy = ToyDecoder()
    ids = torch.tensor([5, 9, 9, 2])
    lane = Lane("r", torch.arange(4).numpy(), torch.arange(1).numpy(), 4)
    view = view_of([lane], lambda _: [1], toy.block_size)
    out = toy.run(Span(0, toy.num_layers), toy.embed(ids, torch.arange(4)), view)
    head = ExitHead(ExitAdapter(kind, 32, 8), toy.norm, toy.lm_head)
    assert torch.equal(head.logits(out.hidden), toy.logits(out.hidden))


def test_confidence_is_the_margin_of_the_two_best_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    said = ExitSignals(logits, ["a", "b"])
    total = sum(torch.e**x for x in (2.0, 1.0, 0.0))
    assert said.token_ids[0] == 0
    assert said.confidence.tolist() == pytest.approx(
        [(torch.e**2 - torch.e) / total, 0.0], abs=1e-6
    )
    assert (len(said), said.req_ids) == (2, ["a", "b"])


def test_the_signals_are_those_of_gating():
    torch.manual_seed(0)
    logits = 4 * torch.randn(9, 50)
    said = ExitSignals(logits)
    torch.testing.assert_close(said.confidence, signals.margin(logits))
    torch.testing.assert_close(said.entropy, signals.entropy(logits))
    assert torch.equal(said.token_ids, logits.argmax(dim=-1))


def test_raising_the_threshold_never_exits_more():
    torch.manual_seed(0)
    confidence = ExitSignals(4 * torch.randn(200, 50)).confidence
    counts = [int((confidence > t).sum()) for t in torch.linspace(0, 1, 21).tolist()]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
