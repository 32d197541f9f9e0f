"""Scheduler: vLLM's own, which makes room for drafts in steps queued ahead; it counts."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import DraftTokenIds

from vllm_accel.host import carrier
from vllm_accel.host.hooks import run_ahead
from vllm_accel.host.metrics import CounterFile
from vllm_accel.host.report import Orders, StepTime, attach, attached
from vllm_accel.host.v1.clock import StepClock
from vllm_accel.host.v1.response import MarkingMixin
from vllm_accel.host.v1.run_ahead import RunAhead, room
from vllm_accel.host.v1.summary import Summary
from vllm_accel.paging import num_pages
from vllm_accel.speculate import StepReport


class AccelScheduler(MarkingMixin, AsyncScheduler):
    """Overrides of AsyncScheduler (vllm/v1/core/sched/async_scheduler.py, 0.32)."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        self._never_pad()
        config = carrier.unloaded(vllm_config)
        if config.method == "free":
            self._look_ahead(config.num_speculative_tokens)
        self._counters = CounterFile(self.vllm_config, config.method)
        self._summary = Summary(config.method)
        self._clock = StepClock()
        self.can_run_ahead = config.run_ahead and _can_queue(vllm_config, kv_cache_config)
        self._run_ahead = RunAhead(allowed=self.can_run_ahead)
        self._longest = config.num_speculative_tokens
        self._layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._exit_layer = config.exit_layer if config.method == "free" else 0
        run_ahead.apply()
        self._measured: list[StepTime] = []
        self._held = False
        self._drafts_are_final = config.method == "free" and config.mode == "exit"
        self._final: Counter[str] = Counter()

    def _never_pad(self) -> None:
        """No drafts are announced as tokens of -1 unless this scheduler says so.

        Announced drafts run, and count as drafted, where nobody fills them in.
        """
        self.dynamic_sd_lookup = [0] * (self.scheduler_config.max_num_seqs + 1)

    def _look_ahead(self, count: int) -> None:
        """Reserves slots behind what is scheduled, for tokens drafted after the step.

        Also in what was computed of it: blocks to leave free for requests that decode.
        """
        self.num_lookahead_tokens = count
        rows = 1 + self.num_spec_tokens + count
        self._spec_decode_step_blocks = sum(
            num_pages(rows, manager.block_size)
            for manager in self.kv_cache_manager.coordinator.single_type_managers
        )

    @property
    def runs_ahead(self) -> bool:
        """Whether the next step may be queued before this one's output is in."""
        return self._run_ahead.on

    @contextmanager
    def scheduling_held(self) -> Iterator[None]:
        """Within it the engine core finds nothing to schedule, and takes an output."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def has_requests(self) -> bool:
        """See `SchedulerInterface.has_requests`."""
        return not self._held and super().has_requests()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Sends orders, and the measured time of what ended, along with the step."""
        scheduler_output = super().schedule(*args, **kwargs)
        grammar = scheduler_output.has_structured_output_requests
        self._run_ahead.scheduled(grammar=grammar)  # it needs the token before
        size = self._make_room(scheduler_output) if self._run_ahead.makes_room else 0
        orders = Orders(
            most_drafts=size if self.runs_ahead else self._longest,
            keep_drafts=size > 0,
            measured=self._measured,
        )
        attach(scheduler_output, orders)
        self._measured = []
        return scheduler_output

    def _make_room(self, scheduler_output: Any) -> int:
        """In the next step of these requests, for drafts that only the workers know.

        Drafts of each: so many requests may run that there is room for none.
        """
        size = room(self._longest, len(self.running), self.max_num_scheduled_tokens)
        placeholders = [-1] * size
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            if not request.is_prefill_chunk:
                request.spec_token_ids = placeholders
        return size

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Counts what requests were given; takes drafts that the workers did not keep."""
        report = attached(model_runner_output)
        if report is not None:
            given = report.final.items()  # some to requests that ended meanwhile
            self._final.update({r: n for r, n in given if r in self.requests})
        self._note_empty_room(scheduler_output, report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        busy = self.has_unfinished_requests()
        measured = self._clock.end(
            scheduler_output,
            StepReport() if report is None else report,
            busy=busy,
        )
        if measured is not None and self.teaches_cost(scheduler_output):
            self._measured.append(measured)
        if report is not None:
            self._take(report, measured, _lengths(outputs))
        self._counters.write(busy=busy)
        return outputs

    def teaches_cost(self, scheduler_output: Any) -> bool:
        """Whether a step took as long as its number of rows says."""
        return True

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forgets what the request was given."""
        given = super()._free_request(request, *args, **kwargs)
        self._final.pop(request.request_id, None)
        return given

    def how_made(self, request: Any) -> dict[str, Any]:
        """See `MarkingMixin.how_made`: tokens no deep layer had a say in."""
        said = super().how_made(request)
        if self._drafts_are_final:
            said["final_tokens"] = self._final[request.request_id]
        return said

    def _note_empty_room(self, scheduler_output: Any, report: StepReport | None) -> None:
        """vLLM takes it for drafts that were rejected, which is right for its counts of
        computed tokens, and subtracts from those drafted what is called invalid."""
        spec = scheduler_output.scheduled_spec_decode_tokens
        ran = {} if report is None else report.verified
        scheduler_output.num_invalid_spec_tokens = {
            req_id: len(announced) - ran.get(req_id, 0)
            for req_id, announced in spec.items()
        }

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """Room that stayed empty is no draft."""
        if (num_invalid_spec_tokens or {}).get(request_id) == num_draft_tokens:
            return spec_decoding_stats
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def _take(
        self, report: StepReport, measured: StepTime | None, given: list[int]
    ) -> None:
        if report.drafts:
            req_ids, drafts = list(report.drafts), list(report.drafts.values())
            self.update_draft_token_ids(DraftTokenIds(req_ids, drafts))
        self._run_ahead.note(report)
        self._count(report, given)
        self._summary.add(report, given, measured)

    def _count(self, report: StepReport, given: list[int]) -> None:
        add = self._counters.add
        for (state, reason), amount in report.gate.items():
            add("vllm:accel_gate_decisions", amount, state=state, reason=reason)
        for length, amount in report.draft_lengths.items():
            add("vllm:accel_draft_length", amount, length=str(length))
        add("vllm:accel_drafted_tokens", report.drafted)
        add("vllm:accel_accepted_tokens", report.accepted)
        add("vllm:accel_final_tokens", report.final.total())
        add("vllm:accel_final_agreed_tokens", report.final_agreed)
        add("vllm:accel_draft_seconds", report.draft_seconds)
        rows = len(given) + sum(report.verified.values())
        alone = report.shallow_rows - report.kept_rows
        layer_rows = rows * self._layers + alone * self._exit_layer
        add("vllm:accel_layer_rows", layer_rows)
        add("vllm:accel_request_steps", len(given))
        add("vllm:accel_output_tokens", sum(given))


def _can_queue(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> bool:
    """Whether queueing a step ahead works and gains anything.

    In one process the worker runs inside the scheduler's calls. Sliding windows have had
    their pages counted for one step in flight.
    """
    groups = kv_cache_config.kv_cache_groups
    return vllm_config.parallel_config.distributed_executor_backend == "mp" and all(
        isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups
    )


def _lengths(outputs: Any) -> list[int]:
    """Tokens of every request that was given any."""
    return [
        len(output.new_token_ids)
        for engine_outputs in outputs.values()
        for output in engine_outputs.outputs
        if output.new_token_ids
    ]
