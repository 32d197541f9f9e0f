"""The gate `quality`: as many tokens as asked for are what all layers would say.

Of mode `exit`, where nothing else corrects a final draft.
"""

import math
from collections import defaultdict
from collections.abc import Container

from vllm_accel.free.exit_head import ExitSignals
from vllm_accel.free.goodput import ExitGoodput
from vllm_accel.free.stack import Seen

RATE = 0.5
"""Log odds of the confidence by which one wrong token moves a threshold."""
MOST_LOG_ODDS = 10.0
"""A threshold goes no further: from there it has to find back."""


class Steering:
    """A threshold for each share of tokens asked for, which meets it on any text.

    Moved after every stack by how many tokens it got wrong less how many it might have:
    adaptive conformal inference (arXiv 2106.00170), in log odds of the confidence.

    Args:
        threshold: confidence where every share begins.
    """

    def __init__(self, threshold: float) -> None:
        begin = _log_odds(threshold)
        self._log_odds: defaultdict[float, float] = defaultdict(lambda: begin)

    def __getitem__(self, quality: float) -> float:
        """The confidence above which a token exits."""
        return 1 / (1 + math.exp(-self._log_odds[quality]))

    def learn(self, quality: float, wrong: int, tokens: int) -> None:
        """Takes in how many tokens were given, and how many the deep layers would not."""
        off = wrong - (1 - quality) * tokens
        moved = self._log_odds[quality] + RATE * off
        self._log_odds[quality] = min(MOST_LOG_ODDS, max(-MOST_LOG_ODDS, moved))


class ExitQuality(ExitGoodput):
    """Tokens above a steered threshold are final; others are drafted where that pays.

    Args:
        draft_tokens: most tokens drafted per request.
        threshold: where it begins.
    """

    reason = "quality"

    def __init__(self, draft_tokens: int, threshold: float) -> None:
        super().__init__(draft_tokens)
        self.thresholds = Steering(threshold)
        self._quality: dict[str, float] = {}

    def exits(self, said: ExitSignals) -> list[bool]:
        """See `ExitGate.exits`."""
        self._quality.update(zip(said.req_ids, said.quality, strict=True))
        return super().exits(said)

    def final(self, said: ExitSignals) -> list[bool]:
        """See `ExitGate.final`."""
        pairs = zip(said.sureness, said.quality, strict=True)
        return [sure > self.thresholds[quality] for sure, quality in pairs]

    def learn(self, seen: Seen) -> None:
        """See `ExitGate.learn`; what stood and was wrong was final.

        The token behind the drafts is the deep layers' own.
        """
        wrong = seen.agree[: seen.given].count(False)
        self.thresholds.learn(self._quality[seen.req_id], wrong, seen.given + 1)
        super().learn(seen)

    def _chances(self, said: ExitSignals) -> list[float]:
        """What is final stands, right or wrong."""
        pairs = zip(self.final(said), super()._chances(said), strict=True)
        return [1.0 if final else chance for final, chance in pairs]

    def threshold_of(self, req_id: str) -> float:
        """The confidence above which a request exits now."""
        return self.thresholds[self._quality[req_id]]

    def keep_only(self, req_ids: Container[str]) -> None:
        """See `ExitGate.keep_only`."""
        super().keep_only(req_ids)
        for req_id in [known for known in self._quality if known not in req_ids]:
            del self._quality[req_id]


def _log_odds(confidence: float) -> float:
    sure = min(1 - 1e-6, max(1e-6, confidence))
    return min(MOST_LOG_ODDS, math.log(sure / (1 - sure)))
