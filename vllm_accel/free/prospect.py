"""What opening a stack comes to, learnt from stacks that the gate ended as it wanted.

Not from the share of tokens on which both models agree: a gate stops where the shallow
model is unsure, so more of its drafts stand than of drafts of a fixed length, and hard
tokens cost it one shallow step and not all of them.
"""

from collections.abc import Container

import numpy as np

from vllm_accel.gating.calibrators import Floats

_PRIOR = 0.6  # that another draft follows, and stands
_RATE = 0.05  # what the newest stack counts once there are many
_KEPT = 0.9  # of a request's older stacks, with each of its own
_AVERAGE_STACKS = 4  # put to a request's own, so that a few bad ones are no verdict
_LEAST = 0.1  # tokens a stack gives, to divide by


class Prospect:
    """Of a stack, the chance that at least 1, 2, ... of a kind come of it.

    Args:
        draft_tokens: most tokens drafted.
    """

    def __init__(self, draft_tokens: int) -> None:
        self._steps = np.arange(1, draft_tokens + 1, dtype=np.float64)
        self.stood: Floats = _PRIOR**self._steps
        """[draft_tokens] drafts that became tokens."""
        self.drafted: Floats = _PRIOR ** (self._steps - 0.5)
        """[draft_tokens] drafts."""
        self.looked: Floats = _PRIOR ** (self._steps - 1.0)
        """[draft_tokens] shallow steps."""
        self.num_stacks = 0
        self._own: dict[str, tuple[float, float]] = {}  # stacks, tokens they gave

    def favour(self, req_id: str) -> float:
        """How much more a request's own stacks gave than those of all: 1 if as much."""
        usual = max(_LEAST, float(self.stood.sum()))
        stacks, given = self._own.get(req_id, (0.0, 0.0))
        return (given + _AVERAGE_STACKS * usual) / ((stacks + _AVERAGE_STACKS) * usual)

    def learn(self, req_id: str, drafted: int, stood: int) -> None:
        """Takes a stack in.

        Args:
            drafted: its drafts; one shallow step more was taken, but at the cap.
            stood: those that became tokens.
        """
        self.num_stacks += 1
        rate = max(_RATE, 1 / self.num_stacks)
        for curve, count in (
            (self.stood, stood),
            (self.drafted, drafted),
            (self.looked, drafted + 1),
        ):
            curve += rate * ((self._steps <= count) - curve)
        stacks, given = self._own.get(req_id, (0.0, 0.0))
        self._own[req_id] = (_KEPT * stacks + 1, _KEPT * given + stood)

    def keep_only(self, req_ids: Container[str]) -> None:
        """Forgets requests that ended."""
        self._own = {known: own for known, own in self._own.items() if known in req_ids}
