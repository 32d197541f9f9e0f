"""Is drafting helping? What was given, against what plain steps would have given."""

from dataclasses import astuple

import numpy as np

from vllm_accel.gating.cost import StepCost, StepShape

_PAUSE = 5.0


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
        """Takes a measured step in which every request decoded.

        A step of many times its price was a pause and counts as its price.
        """
        self._cost.observe(shape, seconds)
        self._plain_steps += shape.decode_rows == shape.requests and not shape.drafted_for
        self._steps.append((shape, tokens, seconds))

    def ratio(self) -> float | None:
        """Above 1 drafting helps; None until plain steps were seen.

        Of the steps since the last call; what they say of costs stays known.
        """
        steps, self._steps = self._steps, []
        if not steps or not self._plain_steps:
            return None
        requests = np.array([shape.requests for shape, _, _ in steps])
        plain_seconds = self._cost.seconds(StepShape(requests, requests)).sum()
        tokens = sum(tokens for _, tokens, _ in steps)
        shapes = StepShape(*np.array([astuple(shape) for shape, _, _ in steps]).T)
        most = _PAUSE * self._cost.seconds(shapes)
        seconds = np.minimum([seconds for _, _, seconds in steps], most).sum()
        return float((tokens / seconds) / (requests.sum() / plain_seconds))
