"""One line per interval in the log: is drafting helping?"""

import logging
import time

from vllm_accel.gating.benefit import Benefit
from vllm_accel.host.report import StepTime
from vllm_accel.speculate import StepReport

logger = logging.getLogger("vllm.vllm_accel")

_INTERVAL_S = 10.0


class Summary:
    """Adds up steps and says every ten seconds what they gave."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._benefit = Benefit()
        self._start_interval()

    def _start_interval(self) -> None:
        self._since = time.monotonic()
        self._steps = self._tokens = self._drafted = self._accepted = 0
        self._open = self._decisions = 0

    def add(self, report: StepReport, given: list[int], measured: StepTime | None) -> None:
        """Adds a step; `given`: output tokens per request that got any."""
        self._steps += len(given)
        self._tokens += sum(given)
        self._drafted += report.drafted
        self._accepted += report.accepted
        self._decisions += report.gate.total()
        self._open += sum(n for (state, _), n in report.gate.items() if state == "open")
        if measured is not None and measured.shape.requests:
            if not measured.shape.prefill_tokens:
                self._benefit.add(measured.shape, sum(given), measured.seconds)
            self._log_when_due()

    def _log_when_due(self) -> None:
        if time.monotonic() - self._since < _INTERVAL_S or not self._steps:
            return
        logger.info(
            "%s: %.2f tokens per request and step (plain: 1), gate open %.0f %%, "
            "%.0f %% of %d drafted tokens accepted; %s",
            self._method,
            self._tokens / self._steps,
            100 * self._open / max(1, self._decisions),
            100 * self._accepted / max(1, self._drafted),
            self._drafted,
            _in_words(self._benefit.ratio()),
        )
        self._start_interval()


def _in_words(ratio: float | None) -> str:
    if ratio is None:
        return "not compared with plain decoding, which this gate never does"
    verdict = "helping" if ratio > 1 else "not helping"
    return f"{ratio:.2f} times the tokens/s that plain steps would give: {verdict}"
