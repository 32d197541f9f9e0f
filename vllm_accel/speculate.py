"""Propose, verify, learn: what every drafting method shares, engine apart.

A method proposes tokens for a request at a position; the engine may shorten the draft
(grammar, token budget, preemption) before the target verifies it. `DraftBook` matches
what was verified to what was proposed by (request, position, token id), never by order.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass


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
