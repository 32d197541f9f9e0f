"""Our part of Model Runner V1 for LazyLLM: which pages are read, which rows run what.

Mixed into whichever runner class vLLM built for the device (see `dress`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput

from vllm_accel.errors import UnsupportedHost
from vllm_accel.host.decoder import Decoder
from vllm_accel.host.v1.lazyllm import settings
from vllm_accel.host.v1.lazyllm.aux_store import AuxBlocks
from vllm_accel.host.v1.lazyllm.forward import SpanForward, averaged
from vllm_accel.host.v1.lazyllm.kv_groups import SpanSpec, groups_of_spans, most_layers
from vllm_accel.host.v1.lazyllm.wire import PageOrders, PruneReport, attach, attached
from vllm_accel.lazyllm.aux_cache import AuxCache
from vllm_accel.lazyllm.pruner import Pruner, Step
from vllm_accel.paging import Cell, WorkerPages


class LazyRunnerMixin:
    """Overrides of GPUModelRunner (vllm/v1/worker/gpu_model_runner.py, 0.32)."""

    def start_pruning(self) -> None:
        """State of our own, made when the runner is dressed."""
        self._lazy = settings.of(self.vllm_config)
        self._schedule = settings.schedule(self.vllm_config)
        self._step: Step | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Finds the layers of the model once it is there."""
        super().load_model(*args, **kwargs)
        self._decoder = Decoder(self.model, self.vllm_config)

    def warming_up_model(self) -> None:
        """Compiles spans where the model is compiled."""
        super().warming_up_model()
        for span in self._schedule.spans:
            self._decoder.prepare(span)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The original's specs, each with the span of its layer."""
        specs = super().get_kv_cache_spec()
        return {name: self._with_span(name, spec) for name, spec in specs.items()}

    def _with_span(self, name: str, spec: KVCacheSpec) -> SpanSpec:
        if type(spec) is not FullAttentionSpec:
            raise UnsupportedHost(
                f"lazyllm does not work with {name}, whose KV cache is a "
                f"{type(spec).__name__}: expected full attention in every layer; serve "
                "the model without lazyllm."
            )
        layer = extract_layer_index(name)
        spans = enumerate(self._schedule.spans)
        (k,) = (k for k, span in spans if span.first <= layer < span.stop)
        aux = settings.aux_blocks(self.vllm_config, spec, self.max_model_len)
        values = {field: getattr(spec, field) for field in spec.__dataclass_fields__}
        return SpanSpec(**values, span=k, aux_blocks=aux if k == 1 else 0)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """Pages, prompts and the forward of spans, made when the cache is."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        groups = groups_of_spans(self.kv_cache_config)
        self._pages = WorkerPages(groups)
        context = self.compilation_config.static_forward_context
        layers = [context[name].kv_cache for name in most_layers(self.kv_cache_config)]
        self._aux_blocks = AuxBlocks(layers, self.model_config.get_hidden_size())
        aux = AuxCache(self._aux_blocks.store) if self._lazy.revives else None
        self._pruner = Pruner(self._lazy, self._schedule, aux)
        self._span_forward = SpanForward(self, self._decoder, self._schedule, groups)

    def _update_states(self, scheduler_output: Any) -> Any:
        """Takes requests in and out, fills granted pages, and begins the step."""
        deferred = super()._update_states(scheduler_output)
        orders: PageOrders | None = attached(scheduler_output)
        if orders is None:  # not of our scheduler's making: nothing is run
            return deferred
        for req_id in scheduler_output.finished_req_ids:
            self._pages.forget(req_id)
            self._pruner.forget(req_id)
        for req_id in started(scheduler_output):
            self._admit(req_id, orders.aux.get(req_id))
        self._put(self._pages.take(orders.answer))
        if scheduler_output.total_num_scheduled_tokens:
            self._step = self._begin(scheduler_output, orders)
        return deferred

    def _admit(self, req_id: str, aux: Sequence[int] | None) -> None:
        """Takes a request; `aux` is None where it must not be pruned."""
        state = self.requests[req_id]
        self._pages.start(req_id, state.block_ids)
        keep = settings.wanted_keep(state.sampling_params, self._schedule)
        self._pruner.admit(
            req_id,
            state.num_prompt_tokens,
            num_cached_tokens=state.num_computed_tokens,
            keep=settings.EVERYTHING if aux is None else keep,
            aux_slots=self._aux_blocks.slots(aux or ()),
        )

    def _put(self, cells: Iterable[Cell]) -> None:
        """Copies what changed in a request's rows to the batch's."""
        for cell in cells:
            i = self.input_batch.req_id_to_index.get(cell.req_id)
            if i is not None:
                table = self.input_batch.block_table[cell.group].get_numpy_array()
                table[i, cell.page] = cell.block_id

    def _begin(self, scheduler_output: Any, orders: PageOrders) -> Step:
        pieces = {}
        for i, req_id in enumerate(self.input_batch.req_ids):
            first = int(self.input_batch.num_computed_tokens_cpu[i])
            count = scheduler_output.num_scheduled_tokens[req_id]
            pieces[req_id] = (first, first + count)
        revived = [
            (req_id, span, page)
            for req_id, spans in orders.answer.granted.items()
            for span, pages in spans.items()
            for page in pages
        ]
        return self._pruner.begin(pieces, revived)

    def _model_forward(
        self,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """In spans where rows differ from span to span, else as the original does."""
        step = self._step
        if step is None:  # a dummy run
            return super()._model_forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
            )
        if step.needs_spans:
            hidden = self._span_forward.run(step, input_ids, positions)
        else:
            asked = self._span_forward.ask(step)
            hidden = super()._model_forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
            )
            for k, scores in enumerate(asked):
                step.note(k, averaged(scores))
        self._settle_pages(step)
        return hidden

    def _settle_pages(self, step: Step) -> None:
        for req_id, spans in step.dropped.items():
            for span, pages in spans.items():
                self._put(self._pages.drop(req_id, span, pages))
        for wanted in step.wants(self._pages.asked):
            self._pages.want(*wanted)

    def pages_run(self) -> dict[str, list[float]] | None:
        """See `LazyCPUWorker.pages_run`."""
        latest = self._pruner.latest
        if latest is None:
            return None
        pages = [latest.share_run(k).tolist() for k in range(len(self._schedule.spans))]
        names = [f"[{span.first},{span.stop})" for span in self._schedule.spans]
        return dict(zip(names, pages, strict=True))

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sends what became of pages to the scheduler with the sampled tokens."""
        output = super().sample_tokens(grammar_output)
        if self._step is not None and isinstance(output, ModelRunnerOutput):
            counts = self._pruner.take_counts()
            attach(output, PruneReport(self._pages.report(), counts))
        self._step = None
        return output


def started(scheduler_output: Any) -> list[str]:
    """Requests that are new in a step, or resumed."""
    new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
    return new + list(scheduler_output.scheduled_cached_reqs.resumed_req_ids)


def dress(runner: Any) -> None:
    """Gives one runner our overrides, whatever class the device's worker made it of."""
    runner.__class__ = type(
        f"Lazy{type(runner).__name__}",
        (LazyRunnerMixin, type(runner)),
        {"__module__": __name__},
    )
    runner.start_pruning()
