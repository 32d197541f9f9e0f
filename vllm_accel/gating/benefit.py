"""Is drafting helping? A plain comparison of the rates that were seen."""

from collections import defaultdict
from dataclasses import dataclass


@dataclass(slots=True)
class _Seen:
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Benefit:
    """Output rate of steps that verified drafts over steps that did not.

    Only steps of the same batch size are compared, weighted by the time spent at it.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[tuple[int, bool], _Seen] = defaultdict(_Seen)

    def add(self, *, num_reqs: int, drafting: bool, tokens: int, seconds: float) -> None:
        """Records one step in which every request was decoding."""
        seen = self._seen[num_reqs, drafting]
        seen.tokens += tokens
        seen.seconds += seconds

    def ratio(self) -> float | None:
        """Above 1 drafting helps; None until both kinds were seen at some batch size."""
        weighted, seconds = 0.0, 0.0
        for (num_reqs, drafting), seen in self._seen.items():
            plain = self._seen.get((num_reqs, False))
            if drafting and plain is not None:
                weighted += seen.seconds * seen.tokens_per_s / plain.tokens_per_s
                seconds += seen.seconds
        return weighted / seconds if seconds else None
