"""Is drafting helping? What was given, against what plain steps would have given."""

from dataclasses import dataclass, field

from vllm_accel.gating.cost import StepCost, StepShape


@dataclass(slots=True)
class Benefit:
    """Output rate over the rate of plain steps for the same requests.

    Comparing the steps that drafted with those that did not would flatter: a gate picks
    the steps that go well, and heads run a step before their drafts are verified. So
    plain time is what the cost model says a step without drafts and heads takes.
    """

    cost: StepCost = field(default_factory=StepCost)
    plain_steps: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _requests: int = 0
    _plain_seconds: float = 0.0

    def add(self, shape: StepShape, tokens: int, seconds: float) -> None:
        """Takes a measured step in which every request decoded."""
        self.cost.observe(shape, seconds)
        self.plain_steps += shape.decode_rows == shape.requests and not shape.drafted_for
        self._tokens += tokens
        self._seconds += seconds
        self._requests += shape.requests
        plain = StepShape(shape.requests, shape.requests)
        self._plain_seconds += float(self.cost.seconds(plain)[0])

    def ratio(self) -> float | None:
        """Above 1 drafting helps; None until plain steps were seen."""
        if not self.plain_steps or not self._requests:
            return None
        return (self._tokens / self._seconds) / (self._requests / self._plain_seconds)

    def start_anew(self) -> None:
        """Begins another interval; what steps cost stays known."""
        self._tokens = self._requests = 0
        self._seconds = self._plain_seconds = 0.0
