"""Are a method's answers plain vLLM's, token for token, but for counted ties?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_accel.bench.engine import TokenIds
from vllm_accel.bench.prompts import Prompt

TIE_BELOW = {"float32": 1e-4}
"""Gap in nats below which two tokens are as good as equal, by dtype."""

HALF_PRECISION_TIE_BELOW = 2e-2


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not plain's, and no tie.

    Attributes:
        prompt: where it came from.
        position: of the first token that differs, from 0.
        plain: token id of plain's answer there; None past its end.
        ours: the method's.
        gap: between plain's two best tokens there, in nats.
    """

    prompt: str
    position: int
    plain: int | None
    ours: int | None
    gap: float

    def __str__(self) -> str:
        return (
            f"{self.prompt}: token {self.position} is {self.ours}, plain's {self.plain}; "
            f"its two best are {self.gap:.2g} nats apart"
        )


@dataclass(slots=True)
class Matches:
    """Counts of answers."""

    identical: int = 0
    ties: int = 0
    differences: list[Difference] = field(default_factory=list)


@dataclass(slots=True)
class Judge:
    """Compares answers; asks plain vLLM where they part.

    Attributes:
        top2_gap: plain's gap after a prompt, in nats.
        tie_below: gap of a tie.
    """

    top2_gap: Callable[[TokenIds], float]
    tie_below: float
    _gaps: dict[tuple[int, ...], float] = field(default_factory=dict)

    def add(
        self, matches: Matches, prompt: Prompt, ours: TokenIds, plain: TokenIds
    ) -> None:
        """Counts one answer."""
        at = first_difference(ours, plain)
        if at is None:
            matches.identical += 1
            return
        gap = self._gap([*prompt.token_ids, *plain[:at]])
        if gap < self.tie_below:
            matches.ties += 1
            return
        theirs, mine = _token(plain, at), _token(ours, at)
        matches.differences.append(Difference(prompt.name, at, theirs, mine, gap))

    def _gap(self, text: TokenIds) -> float:
        """Asked once: the same answer differs in the same place round after round."""
        known = tuple(text)
        if known not in self._gaps:
            self._gaps[known] = self.top2_gap(text)
        return self._gaps[known]


def tie_below(dtype: str) -> float:
    """The gap below which the two best tokens count as tied, in nats."""
    return TIE_BELOW.get(dtype, HALF_PRECISION_TIE_BELOW)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two answers differ, None for equal ones.

    Of two where one begins with the other it is the shorter one's end.
    """
    pairs = zip(a, b, strict=False)
    found = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    return min(len(a), len(b)) if found is None and len(a) != len(b) else found


def _token(token_ids: TokenIds, position: int) -> int | None:
    return token_ids[position] if position < len(token_ids) else None
