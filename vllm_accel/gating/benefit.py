"""Is drafting helping? What was given, against what plain steps would have given."""

import numpy as np

from vllm_accel.gating.cost import StepCost, StepShape


class Benefit:
    """Output rate over the rate of plain steps for the same requests.

    Comparing the steps that drafted with those that did not would flatter: a gate picks
    the steps that go well, and heads run a step before their drafts are verified. So
    plain time is what the cost model says a step without drafts and heads takes.
    """

    def __init__(self) -> None:
        self._cost = StepCost()
        self._plain_steps = 0
        self._steps: list[tuple[StepShape, int, float]] = []

    def add(self, shape: StepShape, tokens: int, seconds: float) -> None:
        """Takes a measured step in which every request decoded."""
        self._steps.append((shape, tokens, seconds))

    def ratio(self) -> float | None:
        """Above 1 drafting helps; None until plain steps were seen.

        Of the steps since the last call; what they say of costs stays known.
        """
        steps, self._steps = self._steps, []
        for shape, _, seconds in steps:
            self._cost.observe(shape, seconds)
            rows = shape.decode_rows
            self._plain_steps += rows == shape.requests and not shape.drafted_for
        if not steps or not self._plain_steps:
            return None
        requests = np.array([shape.requests for shape, _, _ in steps])
        plain_seconds = self._cost.seconds(StepShape(requests, requests)).sum()
        tokens = sum(tokens for _, tokens, _ in steps)
        seconds = sum(seconds for _, _, seconds in steps)
        return float((tokens / seconds) / (requests.sum() / plain_seconds))
