"""Schedulers: vLLM's or ours, taking dropped pages back and handing out wanted ones."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_accel.host.metrics import CounterFile
from vllm_accel.host.v1.lazyllm import settings
from vllm_accel.host.v1.lazyllm.kv_groups import SpanManager, groups_of_spans
from vllm_accel.host.v1.lazyllm.wire import PageOrders, PruneReport, attach, attached
from vllm_accel.host.v1.response import MarkingMixin
from vllm_accel.host.v1.scheduler import AccelScheduler
from vllm_accel.lazyllm.pruner import PruneCounts
from vllm_accel.paging import PageLedger, num_pages


class PoolBooks:
    """`paging.BlockBooks` over vLLM's managers and their pool."""

    def __init__(self, coordinator: Any) -> None:
        self._managers = coordinator.single_type_managers
        self._pool = coordinator.block_pool

    def num_free(self) -> int:
        """See `BlockBooks.num_free`."""
        free: int = self._pool.get_num_free_blocks()
        return free

    def block_at(self, req_id: str, group: int, page: int) -> int:
        """See `BlockBooks.block_at`."""
        block_id: int = self._row(req_id, group)[page].block_id
        return block_id

    def give_back(self, req_id: str, group: int, page: int) -> None:
        """See `BlockBooks.give_back`."""
        row = self._row(req_id, group)
        block, row[page] = row[page], self._pool.null_block
        assert not block.is_null, f"{req_id} gives page {page} of group {group} back twice"
        self._pool.free_blocks([block])

    def take(self, req_id: str, group: int, page: int) -> int:
        """See `BlockBooks.take`."""
        row = self._row(req_id, group)
        assert row[page].is_null, f"{req_id} has page {page} of group {group} already"
        (row[page],) = self._pool.get_new_blocks(1)
        block_id: int = row[page].block_id
        return block_id

    def _row(self, req_id: str, group: int) -> Any:
        return self._managers[group].req_to_blocks[req_id]


class PruningMixin:
    """Overrides of Scheduler (vllm/v1/core/sched/scheduler.py, 0.32)."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        groups = groups_of_spans(kv_cache_config)
        self._ledger = PageLedger(PoolBooks(coordinator), groups)
        self._schedule = settings.schedule(vllm_config)
        self._managers: list[SpanManager] = list(coordinator.single_type_managers)
        self._aux = self._managers[groups[1][0]]
        tokens = 1 + self.num_spec_tokens
        self._pages_of_a_step = sum(
            num_pages(tokens, manager.block_size) for manager in self._managers
        )
        """What decoding takes for a request at the most."""
        self._page_counters = CounterFile(vllm_config, "lazyllm")
        self._counted = (0, 0)

    def add_request(self, request: Any) -> None:
        """Decides whether a request may be pruned, before any of its pages is there."""
        self._mark(request)
        super().add_request(request)

    def _mark(self, request: Any) -> None:
        keep = settings.wanted_keep(request.sampling_params, self._schedule)
        schedule = self._schedule if keep is None else self._schedule.with_keep(keep)
        if request.resumable or not schedule.prunes(request.num_prompt_tokens):
            return
        for manager in self._managers:
            manager.unpublished.add(request.request_id)
        parked = schedule.most_parked(request.num_prompt_tokens)
        spec = self._aux.kv_cache_spec
        wanted = settings.aux_blocks(self.vllm_config, spec, parked)
        self._aux.aux_wanted[request.request_id] = wanted

    def how_made(self, request: Any) -> dict[str, Any]:
        """See `MarkingMixin.how_made`: whether some of its prompt may be left out."""
        pruned = request.request_id in self._aux.aux_wanted
        return {**super().how_made(request), "pruned": pruned}

    def _free_blocks(self, request: Any) -> None:
        """Forgets a request for good."""
        super()._free_blocks(request)
        self._aux.aux_wanted.pop(request.request_id, None)
        for manager in self._managers:
            manager.unpublished.discard(request.request_id)

    def _free_request_blocks(self, request: Any) -> None:
        """Voids what a worker may still say of a request's pages."""
        self._ledger.free(request.request_id)
        super()._free_request_blocks(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Sends answers about pages, and the Aux Cache of new requests, with the step."""
        scheduler_output = super().schedule(*args, **kwargs)
        new = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        new += scheduler_output.scheduled_cached_reqs.resumed_req_ids
        reserve = self._pages_of_a_step * len(self.running)
        answer = self._ledger.answer(new, scheduler_output.num_scheduled_tokens, reserve)
        held = self._aux.aux_held
        aux = {
            req_id: tuple(block.block_id for block in held.get(req_id, ()))
            for req_id in new
            if req_id in self._aux.aux_wanted
        }
        attach(scheduler_output, PageOrders(answer, aux))
        return scheduler_output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes back pages the workers dropped, and what they ask for."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        report: PruneReport | None = attached(model_runner_output)
        if report is not None:
            self._ledger.settle(report.pages)
            self._count_pages(report.counts)
        self._page_counters.write(busy=self.has_unfinished_requests())
        return outputs

    def _count_pages(self, counts: PruneCounts) -> None:
        add = self._page_counters.add
        for span, rows in enumerate(counts.rows):
            add("vllm:accel_span_rows", rows, span=str(span))
        add("vllm:accel_prompts", counts.prompts_pruned, state="pruned")
        add("vllm:accel_prompts", counts.prompts_inert, state="inert")
        ledger = self._ledger
        for state, amount in (
            ("parked", counts.pages_parked),
            ("revived", counts.pages_revived),
            ("given_back", ledger.pages_given_back - self._counted[0]),
            ("declined", ledger.pages_declined - self._counted[1]),
        ):
            add("vllm:accel_prompt_pages", amount, state=state)
        self._counted = (ledger.pages_given_back, ledger.pages_declined)


class LazyScheduler(PruningMixin, MarkingMixin, Scheduler):
    """vLLM's, for LazyLLM alone."""


class LazyAccelScheduler(PruningMixin, AccelScheduler):
    """Ours, for LazyLLM beside a method that drafts."""

    def teaches_cost(self, scheduler_output: Any) -> bool:
        """See `AccelScheduler.teaches_cost`; pages brought back take time of their own."""
        return not attached(scheduler_output).answer.granted
