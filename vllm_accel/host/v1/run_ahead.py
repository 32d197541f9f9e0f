"""Whether the next step is scheduled before this one's output is in."""

from vllm_accel.speculate import StepReport

PATIENCE = 4
"""Steps in which the gate wanted no draft before the engine runs ahead again.

Short enough to lose little behind a trial draft; long enough that a gate which opens for
every other token is not always a step late.
"""


class RunAhead:
    """Runs ahead until the gate asks for drafts.

    Args:
        allowed: False waits for every step.
    """

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._quiet = PATIENCE

    @property
    def on(self) -> bool:
        """True: steps are queued one ahead and must not draft."""
        return self._allowed and self._quiet >= PATIENCE

    def wait(self) -> None:
        """Waits for the next steps."""
        self._quiet = 0

    def note(self, report: StepReport) -> None:
        """Takes in what a finished step drafted, or would have."""
        if report.wanted:
            self.wait()
        elif report.asked:
            self._quiet += 1
