"""The span primitive on vLLM's decoders: run layers `[first, stop)` of the target model.

Any model whose layers are called like Llama's. Where vLLM compiles the model, every span
is compiled as a unit of its own, with the options vLLM compiles the whole with.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.env_override import _apply_constrain_to_fx_strides_patch
from vllm.forward_context import create_forward_context, override_forward_context

from vllm_accel.errors import UnsupportedHost
from vllm_accel.spans import Span

Between = tuple[Tensor, Tensor | None]
"""What one layer hands to the next: hidden states and residual, [n, hidden_size] both.

Their sum is the state after the layer. Kept apart, the residual as `residual_dtype` says,
they are exact to the bit.
"""

Ending = Callable[..., Any]
"""Goes on from what a span's last layer hands on."""

Ended = TypeVar("Ended")

_CALL = ("positions", "hidden_states", "residual")
_WARM_UP_ROWS = 8  # any number but 0 and 1, which a compiler takes for special


class Decoder:
    """A model's layers, in spans.

    A span that starts at 0 takes token ids [n] for hidden states and embeds them; one that
    ends at `num_layers` gives states after the final norm, and no residual.

    Attention reads and writes what vLLM's forward context says; see `span_context`.

    Args:
        model: as vLLM loaded it.
        vllm_config: says whether spans are compiled.

    Raises:
        UnsupportedHost: its layers are called in another way.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self._inner = _inner(model)
        self._vllm_config = vllm_config
        self._units: dict[tuple[Span, Ending | None], Callable[..., Any]] = {}
        self.num_layers = len(self._inner.layers)
        self.hidden_size: int = vllm_config.model_config.get_hidden_size()
        self.residual_dtype = residual_dtype(vllm_config)

    @overload
    def run(
        self, span: Span, hidden: Tensor, residual: Tensor | None, positions: Tensor
    ) -> Between: ...

    @overload
    def run(
        self,
        span: Span,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        ending: Callable[..., Ended],
    ) -> Ended: ...

    def run(
        self,
        span: Span,
        hidden: Tensor,  # [n, hidden_size], contiguous; [n] int32 token ids at layer 0
        residual: Tensor | None,  # [n, hidden_size] `residual_dtype`; None at layer 0
        positions: Tensor,  # [n] int64
        ending: Ending | None = None,
    ) -> Any:
        """What the span's last layer hands on; see the class for its two ends.

        Or what an ending makes of it: compiled with the span, it costs no call of its own.
        """
        return self._unit(span, ending)(hidden, residual, positions)

    def attend(
        self,
        layer: int,
        hidden: Tensor,  # [n, hidden_size]
        residual: Tensor | None,  # [n, hidden_size]
        positions: Tensor,  # [n] int64
    ) -> None:
        """Runs a layer as far as its attention, for what that writes and sees on the way.

        Not compiled: attention is most of it, and nothing else of the layer is run.
        """
        whole = hidden if residual is None else (hidden + residual).to(hidden.dtype)
        module = self._inner.layers[layer]
        module.self_attn(positions=positions, hidden_states=module.input_layernorm(whole))

    def norm(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] after the final norm, of states whose residual is added."""
        normed: Tensor = self._inner.norm(hidden)
        return normed

    def prepare(self, span: Span, ending: Ending | None = None) -> None:
        """Compiles a span before the first request does, where spans are compiled."""
        self._unit(span, ending)

    def _unit(self, span: Span, ending: Ending | None) -> Callable[..., Any]:
        if (span, ending) not in self._units:
            self._units[span, ending] = self._make_unit(span, ending)
        return self._units[span, ending]

    def _make_unit(self, span: Span, ending: Ending | None) -> Callable[..., Any]:
        embed = None if span.first else self._inner.embed_input_ids
        norm = self._inner.norm if span.stop == self.num_layers else None
        layers = list(self._inner.layers)[span.first : span.stop]
        run = _through(layers, embed, norm, self.residual_dtype, ending)
        config = self._vllm_config.compilation_config
        if config.mode == CompilationMode.NONE:
            return run
        compiled = _compiled(run, config)
        self._warm_up(span, compiled)
        return compiled

    @torch.inference_mode()
    def _warm_up(self, span: Span, unit: Callable[..., Any]) -> None:
        """Compiles for any number of rows; attention without metadata does nothing."""
        positions = torch.arange(_WARM_UP_ROWS)
        hidden, residual = positions.int(), None
        if span.first:
            dtype = self._vllm_config.model_config.dtype
            hidden = torch.zeros(_WARM_UP_ROWS, self.hidden_size, dtype=dtype)
            residual = torch.zeros_like(hidden, dtype=self.residual_dtype)
        for rows in (hidden, residual, positions):
            if rows is not None:
                torch._dynamo.mark_dynamic(rows, 0)
        context = create_forward_context(None, self._vllm_config)
        with override_forward_context(context):
            unit(hidden, residual, positions)


def residual_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """What residuals are handed on in, so that two spans are what one is.

    Layers round their residual to the model's type. Compiled together they never do: the
    compiler drops a rounding whose result is added to at once. So the end of a compiled
    span must not round either.
    """
    compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
    if compiled and vllm_config.device_config.device_type == "cpu":
        return torch.float32
    return vllm_config.model_config.dtype


def _through(
    layers: Sequence[nn.Module],
    embed: Callable[[Tensor], Tensor] | None,
    norm: Any,
    residual_dtype: torch.dtype,
    ending: Ending | None,
) -> Callable[..., Any]:
    def run(hidden: Tensor, residual: Tensor | None, positions: Tensor) -> Any:
        if embed is not None:
            hidden = embed(hidden)
        for layer in layers:
            hidden, residual = layer(positions, hidden, residual)
        if norm is None:
            residual = residual.to(residual_dtype)
        else:
            hidden, residual = norm(hidden, residual)[0], None
        return (hidden, residual) if ending is None else ending(hidden, residual)

    # The compiler keeps what it made by code object, and is told to check nothing else.
    run.__code__ = run.__code__.replace(co_name=f"run_{id(layers)}")
    return run


def _compiled(run: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """As vllm/compilation/wrapper.py:TorchCompileWithNoGuardsWrapper does it (0.32)."""
    _apply_constrain_to_fx_strides_patch()
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if config.backend == "inductor":
        options |= config.inductor_compile_config
    return torch.compile(
        run, fullgraph=True, dynamic=False, backend=config.backend, options=options
    )


def _inner(model: nn.Module) -> Any:
    """The part of a model that holds its layers."""
    inner = vars(model)["_modules"].get("model")
    parts = [] if inner is None else [*vars(inner)["_modules"]]
    if not {"layers", "norm", "embed_tokens"} <= set(parts):
        raise UnsupportedHost(_refusal(type(model).__name__, "has no layers like Llama's"))
    for layer in inner.layers:
        if not _is_called_like_llama(layer):
            raise UnsupportedHost(
                _refusal(type(layer).__name__, "is called in another way")
            )
    return inner


def _is_called_like_llama(layer: nn.Module) -> bool:
    parameters = list(inspect.signature(layer.forward).parameters.values())
    extra = [p for p in parameters[3:] if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    return tuple(p.name for p in parameters[:3]) == _CALL and not extra


def _refusal(what: str, why: str) -> str:
    return (
        f"{what} {why}: expected a model whose layers are called with "
        f"({', '.join(_CALL)}), such as Llama, Mistral, Qwen2 or Qwen3; serve it without "
        "free."
    )
