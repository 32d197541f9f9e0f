"""Scheduler: vLLM's own, without padded drafts; it counts and times what steps give."""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from vllm_accel.cerberus.drafter import StepReport
from vllm_accel.host.hooks import drafts_with_output
from vllm_accel.host.metrics import CounterFile
from vllm_accel.host.report import attach, attached
from vllm_accel.host.v1.clock import StepClock
from vllm_accel.host.v1.summary import Summary


class AccelScheduler(Scheduler):
    """Overrides of Scheduler (vllm/v1/core/sched/scheduler.py, 0.32)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._never_pad()
        drafts_with_output.apply()
        self._counters = CounterFile(self.vllm_config, "cerberus")
        self._summary = Summary()
        self._clock = StepClock()

    def _never_pad(self) -> None:
        """Lets draft lengths differ from step to step.

        With a fixed length vLLM pads a request whose prompt is fully cached to a full
        draft of -1 tokens, which run, count as drafted, and are all rejected.
        """
        batch_sizes = self.scheduler_config.max_num_seqs + 1
        self.dynamic_sd_lookup = [self.num_spec_tokens] * batch_sizes

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Sends the measured time of the last step along with this one."""
        scheduler_output = super().schedule(*args, **kwargs)
        measured = self._clock.start()
        if measured is not None:
            attach(scheduler_output, measured)
        self._summary.add_time(measured)
        return scheduler_output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes the drafts that came with the output; counts what requests were given."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        report = attached(model_runner_output)
        if report is not None:
            if any(report.drafts):
                self.update_draft_token_ids(DraftTokenIds(report.req_ids, report.drafts))
            given = [
                len(output.new_token_ids)
                for engine_outputs in outputs.values()
                for output in engine_outputs.outputs
                if output.new_token_ids
            ]
            self._count(report, given)
            self._summary.add(report, given)
        busy = self.has_unfinished_requests()
        drafted_for = 0 if report is None else report.drafted_for
        self._clock.end(scheduler_output, drafted_for, busy=busy)
        self._counters.write(busy=busy)
        return outputs

    def _count(self, report: StepReport, given: list[int]) -> None:
        add = self._counters.add
        for (state, reason), amount in report.gate.items():
            add("vllm:accel_gate_decisions", amount, state=state, reason=reason)
        for length, amount in report.draft_lengths.items():
            add("vllm:accel_draft_length", amount, length=str(length))
        add("vllm:accel_drafted_tokens", report.drafted)
        add("vllm:accel_accepted_tokens", report.accepted)
        add("vllm:accel_draft_seconds", report.draft_seconds)
        add("vllm:accel_request_steps", len(given))
        add("vllm:accel_output_tokens", sum(given))
