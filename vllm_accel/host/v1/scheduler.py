"""Scheduler: vLLM's own, without padded drafts, counting what drafting gives."""

import logging
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from vllm_accel.cerberus.drafter import StepReport
from vllm_accel.gating.benefit import Benefit
from vllm_accel.host.hooks import drafts_with_output
from vllm_accel.host.metrics import CounterFile
from vllm_accel.host.report import attached

logger = logging.getLogger("vllm.vllm_accel")

_LOG_INTERVAL_S = 10.0


class AccelScheduler(Scheduler):
    """Overrides of Scheduler (vllm/v1/core/sched/scheduler.py, 0.32)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._never_pad()
        drafts_with_output.apply()
        self._counters = CounterFile(self.vllm_config, "cerberus")
        self._summary = _Summary()
        self._last_step_end = time.monotonic()

    def _never_pad(self) -> None:
        """Lets draft lengths differ from step to step.

        With a fixed length vLLM pads a request whose prompt is fully cached to a full
        draft of -1 tokens, which run, count as drafted, and are all rejected.
        """
        batch_sizes = self.scheduler_config.max_num_seqs + 1
        self.dynamic_sd_lookup = [self.num_spec_tokens] * batch_sizes

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes the drafts that came with the output; counts what requests were given."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        report = attached(model_runner_output)
        if report is not None:
            self.update_draft_token_ids(DraftTokenIds(report.req_ids, report.drafts))
            given = [
                len(output.new_token_ids)
                for engine_outputs in outputs.values()
                for output in engine_outputs.outputs
                if output.new_token_ids
            ]
            self._count(report, given)
            self._observe(scheduler_output, report, given)
        self._last_step_end = time.monotonic()
        return outputs

    def _count(self, report: StepReport, given: list[int]) -> None:
        add = self._counters.add
        for (state, reason), amount in report.gate.items():
            add("vllm:accel_gate_decisions", amount, state=state, reason=reason)
        for length, amount in report.draft_lengths.items():
            add("vllm:accel_draft_length", amount, length=str(length))
        add("vllm:accel_drafted_tokens", report.drafted)
        add("vllm:accel_accepted_tokens", report.accepted)
        add("vllm:accel_request_steps", len(given))
        add("vllm:accel_output_tokens", sum(given))

    def _observe(self, scheduler_output: Any, report: StepReport, given: list[int]) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        lengths = scheduler_output.num_scheduled_tokens
        all_decode = not scheduler_output.scheduled_new_reqs and all(
            tokens == 1 + len(drafts.get(req_id, ())) for req_id, tokens in lengths.items()
        )
        seconds = time.monotonic() - self._last_step_end if all_decode else None
        self._summary.add(report, given, bool(drafts), seconds)
        self._summary.log_when_due()


class _Summary:
    """One line per interval: is drafting helping?"""

    def __init__(self) -> None:
        self._benefit = Benefit()
        self._start_interval()

    def _start_interval(self) -> None:
        self._since = time.monotonic()
        self._steps = self._tokens = self._drafted = self._accepted = 0
        self._open = self._decisions = 0

    def add(
        self,
        report: StepReport,
        given: list[int],
        drafting: bool,
        seconds: float | None,
    ) -> None:
        """Adds a step; `seconds` only when every request in it was decoding."""
        self._steps += len(given)
        self._tokens += sum(given)
        self._drafted += report.drafted
        self._accepted += report.accepted
        self._decisions += report.gate.total()
        self._open += sum(n for (state, _), n in report.gate.items() if state == "open")
        if seconds is not None and given:
            self._benefit.add(
                num_reqs=len(given),
                drafting=drafting,
                tokens=sum(given),
                seconds=seconds,
            )

    def log_when_due(self) -> None:
        """Logs and starts anew once the interval is over."""
        if time.monotonic() - self._since < _LOG_INTERVAL_S or not self._steps:
            return
        logger.info(
            "cerberus: %.2f tokens per request and step (plain: 1), gate open %.0f %%, "
            "%.0f %% of %d drafted tokens accepted; drafting steps give %s",
            self._tokens / self._steps,
            100 * self._open / max(1, self._decisions),
            100 * self._accepted / max(1, self._drafted),
            self._drafted,
            _in_words(self._benefit.ratio()),
        )
        self._start_interval()


def _in_words(ratio: float | None) -> str:
    if ratio is None:
        return "a rate not yet compared (no plain steps at the same batch size)"
    verdict = "helping" if ratio > 1 else "not helping"
    return f"{ratio:.2f} times the tokens/s of plain steps: {verdict}"
