"""Propose, verify, learn: what every drafting method shares, engine apart.

A method proposes tokens for a request at a position; the engine may shorten the draft
(grammar, token budget, preemption) before the target verifies it. `DraftBook` matches
what was verified to what was proposed by (request, position, token id), never by order.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

Decided = TypeVar("Decided")

NO_ROOM = "no_room"
"""Reason of a request that cannot use another draft."""
AHEAD = "ahead"
"""Reason of a request that wanted to draft while the next step had no room for it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target said about one draft."""

    req_id: str
    position: int
    """Index in the sequence of the first drafted token."""
    proposed: int
    """Tokens the method drafted."""
    verified: int
    """Tokens the engine scheduled of these, 0 when it dropped the draft."""
    accepted: int
    """Leading tokens the target agreed with."""


@dataclass(slots=True)
class StepReport:
    """What one step decided and learnt; travels from the worker to the scheduler."""

    drafts: dict[str, list[int]] = field(default_factory=dict)
    """By request, the tokens to verify next, where the scheduler has to know; no empty
    ones."""
    verified: dict[str, int] = field(default_factory=dict)
    """By request, the draft tokens this step ran; requests with none are left out."""
    gate: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by (state, reason): state is open or closed."""
    draft_lengths: Counter[int] = field(default_factory=Counter)
    """Requests by tokens drafted, 0 included."""
    drafted: int = 0
    """Draft tokens the target verified."""
    accepted: int = 0
    """Draft tokens it agreed with."""
    drafted_for: int = 0
    """Requests something was drafted for."""
    asked: int = 0
    """Requests the gate could open for."""
    wanted: int = 0
    """Requests something was drafted for, or would have been if the step could draft."""
    draft_seconds: float = 0.0
    """Time spent deciding and drafting."""
    final: Counter[str] = field(default_factory=Counter)
    """Per request, tokens given that the deep layers could not correct."""
    final_agreed: int = 0
    """Those that the deep layers would have chosen too."""
    shallow_steps: int = 0
    """Times the first layers were run alone."""
    shallow_rows: int = 0
    """Rows they were run on."""
    kept_rows: int = 0
    """Rows of the step itself that skipped the first layers."""

    def add_verdict(self, verdict: Verdict) -> None:
        """Counts one verdict."""
        self.drafted += verdict.verified
        self.accepted += verdict.accepted


@dataclass(frozen=True, slots=True)
class Decoding:
    """The requests of a step, entry by entry."""

    req_ids: Sequence[str]
    rows: Sequence[int]
    """The row of the last accepted token; below 0 for one that is not decoding yet."""
    next_tokens: Sequence[int]
    """What the target chose there."""
    room: Sequence[int]
    """Tokens that may still be drafted."""


Admit = Callable[[list[int], int], list[bool]]
"""Asks a gate: requests that have room, and how many decode -> where to draft."""


class Share(Protocol):
    """Under tensor parallelism, makes every rank go by what rank 0 decides.

    Called on every rank alike, with what decides.
    """

    def __call__(self, decide: Callable[[], Decided]) -> Decided:
        """What rank 0 decides."""


def alone(decide: Callable[[], Decided]) -> Decided:
    """`Share` where there is one rank."""
    return decide()


class Opening:
    """Which requests of a step draft: room, the gate, and whether the step may.

    Args:
        share: called on every step; what drafts may wait for all ranks.
    """

    def __init__(self, share: Share = alone) -> None:
        self._share = share
        self._is_due = False
        """The gate wants drafts; the steps until it can have them are on their way."""

    def requests(
        self,
        step: Decoding,
        admit: Admit,
        reason: str,
        report: StepReport,
        *,
        may_draft: bool,
    ) -> list[int]:
        """The requests to draft for.

        Args:
            admit: of the gate.
            reason: of the gate.
            report: gains these decisions.
            may_draft: False asks the gate, and answers [].
        """
        decoding = [i for i, row in enumerate(step.rows) if row >= 0]
        able = [i for i in decoding if step.room[i] > 0]
        wanted = self._share(
            lambda: self._wanted(able, lambda: admit(able, len(decoding)), may_draft)
        )
        opened = wanted if may_draft else []
        report.asked, report.wanted = len(able), len(wanted)
        report.drafted_for = len(opened)
        report.gate["open", reason] += len(opened)
        report.gate["closed", reason] += len(able) - len(wanted)
        report.gate["closed", AHEAD] += len(wanted) - len(opened)
        report.gate["closed", NO_ROOM] += len(decoding) - len(able)
        return opened

    def _wanted(
        self, able: list[int], ask: Callable[[], list[bool]], may_draft: bool
    ) -> list[int]:
        if not able or (self._is_due and not may_draft):
            return able
        wanted = [i for i, yes in zip(able, ask(), strict=True) if yes]
        self._is_due = bool(wanted) and not may_draft
        return wanted


class DraftBook:
    """Drafts that wait for their verdict."""

    def __init__(self) -> None:
        self._drafts: dict[str, tuple[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._drafts)

    def note(self, req_id: str, position: int, token_ids: Sequence[int]) -> None:
        """Remembers a draft; a request has one at a time."""
        self._drafts[req_id] = (position, tuple(token_ids))

    def settle(
        self,
        req_id: str,
        position: int,
        scheduled: Sequence[int],
        num_sampled: int,
    ) -> Verdict | None:
        """The verdict on a request's draft, which leaves the book.

        Args:
            position: index of the first token sampled in this step.
            scheduled: draft token ids the engine verified; padding is below 0.
            num_sampled: tokens the step emitted: the accepted ones and one more.

        Returns:
            None if nothing was drafted there, or something else was verified: such a
            step teaches nothing.
        """
        noted_position, token_ids = self._drafts.pop(req_id, (-1, ()))
        verified = tuple(token for token in scheduled if token >= 0)
        if noted_position != position or token_ids[: len(verified)] != verified:
            return None
        accepted = min(num_sampled - 1, len(verified))
        return Verdict(req_id, position, len(token_ids), len(verified), accepted)

    def draft(self, req_id: str, position: int) -> tuple[int, ...]:
        """What was drafted for a request from `position` on; () if nothing."""
        noted_position, token_ids = self._drafts.get(req_id, (-1, ()))
        return token_ids if noted_position == position else ()

    def drop(self, req_ids: Iterable[str]) -> None:
        """Drops the drafts of requests that had their turn, verified or not."""
        for req_id in req_ids:
            self._drafts.pop(req_id, None)

    def keep_only(self, req_ids: Container[str]) -> None:
        """Drops the drafts of requests that ended."""
        for req_id in [known for known in self._drafts if known not in req_ids]:
            del self._drafts[req_id]


def draft_room(
    *,
    num_tokens: int,
    num_prompt_tokens: int,
    max_model_len: int,
    max_tokens: int | None,
    min_tokens: int,
) -> int:
    """Draft tokens a request can still use: the target adds one to any draft.

    Below `min_tokens` the target's own extra token may not be the one that ends the
    request. vLLM decides that by the tokens given so far, drafts not counted, so a draft
    must not reach past the minimum (vllm/v1/sample/logits_processor/builtin.py, 0.32).
    """
    end = max_model_len
    if max_tokens is not None:
        end = min(end, num_prompt_tokens + max_tokens)
    first_free = num_prompt_tokens + min_tokens
    if num_tokens < first_free:
        end = min(end, first_free)
    return end - num_tokens - 1
