"""What opening a stack comes to, learnt from stacks that the gate ended as it wanted.

Not from the share of tokens on which both models agree: a gate stops where the shallow
model is unsure, so more of its drafts stand than of drafts of a fixed length, and hard
tokens cost it one shallow step and not all of them.
"""

import numpy as np

from vllm_accel.gating.calibrators import Floats

_PRIOR = 0.6  # that another draft follows, and stands
_RATE = 0.05  # what the newest stack counts once there are many


class Prospect:
    """Of a stack, the chance that at least 1, 2, ... of a kind come of it.

    Args:
        draft_tokens: most tokens drafted.
    """

    def __init__(self, draft_tokens: int) -> None:
        self._steps = np.arange(1, draft_tokens + 1)
        self.stood: Floats = _PRIOR**self._steps
        """[draft_tokens] drafts that became tokens."""
        self.drafted: Floats = _PRIOR ** (self._steps - 0.5)
        """[draft_tokens] drafts."""
        self.looked: Floats = _PRIOR ** (self._steps - 1.0)
        """[draft_tokens] shallow steps."""
        self.num_stacks = 0

    def learn(self, drafted: int, stood: int) -> None:
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
