"""Synchronized parallel decoding: tokens wait after the shallow layers, then all go on.

Bookkeeping of FREE's stacks, engine apart. A request opens a stack with the token it was
just given. Shallow steps run the first layers on the newest token of every open stack and
keep its state (the exit state); a confident choice becomes the next token, a draft. Then
the deep layers run once on every stacked row. A stack of n rows has

- n - 1 drafts, if the last choice was not confident: that row is stacked all the same, as
  in the paper, and the deep layers say what follows it;
- n drafts, if the cap, the room or a token that stops the request ended it: the last draft
  has no row and goes through all layers.

What becomes of a stack:

| event | call |
|---|---|
| a stop token is drafted | none, drafting ends by itself; in mode `exit` `drop` then |
| max_tokens, max_model_len | none, `open` is told the room |
| stop string, abort, end | `drop`, or `keep_only` the living; deep layers never run |
| preemption | `drop`, before anything else: the shallow KV is gone |
| the engine cuts the draft | none, `kept_rows` and `settle` go by what is scheduled |
| not scheduled in a step | none, states and shallow KV wait |
| tokens under a grammar | in mode `exit` do not `open`: only deep logits are masked |
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor


@dataclass(slots=True)
class _Stack:
    """One request's tokens that went through the shallow layers only."""

    position: int
    """Index in the sequence of the first token."""
    token_ids: list[int]
    """Tokens to run: the first one given, the others drafted."""
    place: int
    """Its rows in `ExitStacks.states` start here."""
    most: int
    """Drafts it may have."""
    stop_token_ids: Container[int]
    predicted: list[int] = field(default_factory=list)
    """The shallow choice after each token that was run."""
    confidence: list[float] = field(default_factory=list)
    """Of these choices."""
    final: list[bool] = field(default_factory=list)
    """Of the drafts, whether they stand unverified in mode "exit"."""
    open: bool = True
    """The newest token is still to be run."""

    @property
    def drafts(self) -> list[int]:
        return self.token_ids[1:]


@dataclass(frozen=True, slots=True)
class ShallowRows:
    """The next shallow step: one row per open stack."""

    req_ids: list[str]
    token_ids: list[int]
    positions: list[int]
    """Index in the sequence of each token."""
    state_rows: list[int]
    """Where in `ExitStacks.states` each exit state goes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the deep layers showed of one stack: the estimator's evidence.

    FREE's estimator takes it in whenever something was drafted.
    """

    req_id: str
    drafted: int
    confidence: list[float]
    """Per stacked row the deep layers had a word on."""
    agree: list[bool]
    """Per such row, whether shallow and deep choice are one."""
    stood: int | None = None
    """Drafts that became tokens of the answer: not those the engine cut or took back.
    None: all of them."""

    @property
    def given(self) -> int:
        """Tokens the stack gave, the deep layers' own behind the drafts apart."""
        return self.drafted if self.stood is None else self.stood


class ExitStacks:
    """The stacks of all requests.

    Args:
        cap: most tokens drafted per request and step.
        max_reqs: requests that may have a stack at once.
        state_width: numbers kept per row: the hidden size, or twice that where a layer
            hands on a residual of its own and resuming is to be exact to the bit.
        dtype: of the states.
        device: of the states.
    """

    def __init__(
        self,
        *,
        cap: int,
        max_reqs: int,
        state_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cap = cap
        self.states = torch.zeros(max_reqs * cap, state_width, dtype=dtype, device=device)
        """[max_reqs * cap, state_width] exit states; `ShallowRows` says which row."""
        self._stacks: dict[str, _Stack] = {}
        self._free = [cap * i for i in reversed(range(max_reqs))]

    def __len__(self) -> int:
        return len(self._stacks)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._stacks

    def open(
        self,
        req_id: str,
        position: int,
        token_id: int,
        room: int,
        stop_token_ids: Container[int] = (),
    ) -> bool:
        """Opens a request's stack with the token it was just given.

        Args:
            position: index of that token in the sequence.
            token_id: it was sampled, and no layer has run on it.
            room: drafts the request may have now: `speculate.draft_room`, the policy's
                length; the cap holds besides.
            stop_token_ids: drafting ends with one of these.

        Returns:
            Whether anything can be drafted: not without room, nor while `max_reqs`
            others have stacks. An older stack of the request is gone either way.
        """
        self.drop(req_id)
        most = min(room, self.cap)
        if most < 1 or not self._free:
            return False
        place = self._free.pop()
        self._stacks[req_id] = _Stack(position, [token_id], place, most, stop_token_ids)
        return True

    def next_rows(self) -> ShallowRows | None:
        """The next shallow step, None if every stack is closed."""
        stacks = [(i, stack) for i, stack in self._stacks.items() if stack.open]
        if not stacks:
            return None
        done = [len(stack.predicted) for _, stack in stacks]
        return ShallowRows(
            [req_id for req_id, _ in stacks],
            [stack.token_ids[-1] for _, stack in stacks],
            [stack.position + n for (_, stack), n in zip(stacks, done, strict=True)],
            [stack.place + n for (_, stack), n in zip(stacks, done, strict=True)],
        )

    def push(
        self,
        rows: ShallowRows,
        states: Tensor,  # [rows, state_width]
        predicted: Iterable[int],
        confidence: Iterable[float],
        exits: Iterable[bool],
        final: Iterable[bool] | None = None,
    ) -> None:
        """Takes a shallow step in.

        Args:
            rows: what was run.
            states: the exit states, kept.
            predicted: per row, the shallow choice.
            confidence: per row, its confidence.
            exits: per row, whether that is enough; the paper: above the threshold.
            final: per row, whether the choice stands unverified in mode "exit"; None: all
                that exit do, as in the paper.
        """
        self.states[rows.state_rows] = states
        final = repeat(True, len(rows.req_ids)) if final is None else final
        choices = zip(rows.req_ids, predicted, confidence, exits, final, strict=True)
        for req_id, token_id, sure, leaves, stands in choices:
            _push(self._stacks[req_id], token_id, sure, leaves, stands)

    def close(self, req_ids: Iterable[str]) -> None:
        """Ends the drafting of requests, drafts so far kept: the policy's last word."""
        for req_id in req_ids:
            self._stacks[req_id].open = False

    def drafts(self, req_id: str) -> list[int]:
        """What a request has drafted, [] without a stack."""
        stack = self._stacks.get(req_id)
        return stack.drafts if stack else []

    def final(self, req_id: str) -> list[bool]:
        """Of a request's drafts, whether they stand unverified; [] without a stack."""
        stack = self._stacks.get(req_id)
        return list(stack.final) if stack else []

    def kept_rows(self, req_id: str, position: int, token_ids: Sequence[int]) -> list[int]:
        """Rows of `states` for the leading tokens whose shallow part is done.

        Args:
            position: index in the sequence of the first token scheduled.
            token_ids: tokens scheduled: the one given last, then the drafts left.

        Returns:
            As many rows as scheduled tokens are the stack's, by request, position and
            token id; the tokens after them go through all layers.
        """
        stack = self._stacks.get(req_id)
        if stack is None or stack.position != position:
            return []
        same = _common(stack.token_ids[: len(stack.predicted)], token_ids)
        return list(range(stack.place, stack.place + same))

    def settle(
        self, req_id: str, position: int, deep_token_ids: Sequence[int]
    ) -> Seen | None:
        """What the deep layers said of a stack, which is gone then.

        Args:
            position: index in the sequence of the first token that was scheduled.
            deep_token_ids: the deep choice after each scheduled token, as far as it stands:
                in mode `verify` what was sampled, which ends at the first disagreement; in
                mode `exit` that of every row, for every draft is final.

        Returns:
            None if there was no stack at that position.
        """
        stack = self._stacks.get(req_id)
        self.drop(req_id)
        if stack is None or stack.position != position:
            return None
        known = min(len(stack.predicted), len(deep_token_ids))
        agree = [stack.predicted[i] == deep_token_ids[i] for i in range(known)]
        return Seen(req_id, len(stack.drafts), stack.confidence[:known], agree)

    def drop(self, req_id: str) -> None:
        """Forgets a request's stack, if it has one."""
        stack = self._stacks.pop(req_id, None)
        if stack is not None:
            self._free.append(stack.place)

    def keep_only(self, req_ids: Container[str]) -> None:
        """Drops the stacks of requests that ended."""
        for req_id in [known for known in self._stacks if known not in req_ids]:
            self.drop(req_id)


def _push(
    stack: _Stack, predicted: int, confidence: float, exits: bool, final: bool
) -> None:
    stack.predicted.append(predicted)
    stack.confidence.append(confidence)
    if not exits:
        stack.open = False
        return
    stack.token_ids.append(predicted)
    stack.final.append(final)
    full = len(stack.drafts) == stack.most
    stack.open = not full and predicted not in stack.stop_token_ids


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return i
    return min(len(ours), len(theirs))


def first_to_undo(surprise: Sequence[float], limit: float | None) -> int | None:
    """The first draft RollBack takes back, None if all stand (FREE, section RollBack).

    Args:
        surprise: per draft, -ln of the probability the deep layers give it.
        limit: a draft above it is cut with all that follow, its KV in every layer too,
            and the deep choice stands in its place; None never undoes.
    """
    if limit is None:
        return None
    return next((i for i, nats in enumerate(surprise) if nats > limit), None)
