"""Spans of a model in Llama's shape; vLLM's own is in tests/engine/test_free_law.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm.config import CompilationMode

from vllm_accel.errors import UnsupportedHost
from vllm_accel.free.exit_head import ExitAdapter, ExitHead
from vllm_accel.host.decoder import Decoder
from vllm_accel.spans import Span

WIDTH, LAYERS = 8, 4


class Norm(nn.Module):
    """Adds the residual, as vLLM's norms do."""

    def forward(self, hidden, residual=None):
        if residual is None:
            return hidden * 2
        return (hidden + residual) * 2, hidden + residual


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = Norm()
        self.number = number

    def forward(self, positions, hidden_states, residual):
        if residual is None:
            residual = hidden_states
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        return self.linear(hidden_states) + positions[:, None], residual


class Inner(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.embed_tokens = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(layer(i) for i in range(LAYERS))
        self.norm = Norm()

    def embed_input_ids(self, token_ids):
        return self.embed_tokens(token_ids)

    def forward(self, token_ids, positions):
        hidden, residual = self.embed_input_ids(token_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


def made(mode=CompilationMode.NONE, layer=Layer, seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    model.model = Inner(layer)
    compilation = SimpleNamespace(
        mode=mode,
        backend="eager",
        inductor_compile_config={},
        fast_moe_cold_start=False,
        static_forward_context={},
    )
    config = SimpleNamespace(
        compilation_config=compilation,
        model_config=SimpleNamespace(get_hidden_size=lambda: WIDTH, dtype=torch.float32),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    return model.model, Decoder(model, config)


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
@pytest.mark.parametrize("cuts", [[], [1], [3], [1, 2]])
@torch.inference_mode()
def test_spans_one_after_the_other_are_the_whole(mode, cuts):
    inner, decoder = made(mode)
    for rows in (1, 5, 7):
        token_ids, positions = torch.arange(rows) % 16, torch.arange(rows)
        hidden, residual = token_ids, None
        for first, stop in zip([0, *cuts], [*cuts, LAYERS], strict=True):
            span = Span(first, stop)
            hidden, residual = decoder.run(span, hidden, residual, positions)
        assert residual is None
        assert torch.equal(hidden, inner(token_ids, positions))


@torch.inference_mode()
def test_two_models_compiled_in_one_process_stay_two():
    positions = torch.arange(3)
    for seed in (0, 1):
        inner, decoder = made(CompilationMode.DYNAMO_TRACE_ONCE, seed=seed)
        found, _ = decoder.run(Span(0, LAYERS), positions, None, positions)
        assert torch.equal(found, inner(positions, positions))


class OtherwiseCalled(Layer):
    def forward(self, hidden_states, positions, cache):
        return hidden_states


def test_layers_called_in_another_way_are_refused():
    with pytest.raises(UnsupportedHost, match="OtherwiseCalled is called in another way"):
        made(layer=OtherwiseCalled)
    with pytest.raises(UnsupportedHost, match="has no layers like Llama's"):
        Decoder(nn.Linear(2, 2), None)


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
def test_an_ending_goes_on_from_what_a_span_hands_on(mode):
    _, decoder = made(mode)
    span = Span(0, 2)
    adapter = ExitAdapter("mlp", WIDTH, 4)
    nn.init.normal_(adapter.up.weight)
    head = ExitHead(adapter, decoder.norm, nn.Linear(WIDTH, 16))
    for rows in (1, 5, 7):
        token_ids, positions = torch.arange(rows).int(), 3 * torch.arange(rows)
        with torch.inference_mode():
            said = decoder.run(span, token_ids, None, positions, head.read)
            expected = head.read(*decoder.run(span, token_ids, None, positions))
        for name, found in said._asdict().items():
            torch.testing.assert_close(found, getattr(expected, name), msg=name)
