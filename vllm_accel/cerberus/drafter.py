"""One drafting step: which requests draft, and what.

The engine's adapter says which requests have room and where their last accepted token
is; everything else is decided here, on plain tensors.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import LearningGate
from vllm_accel.gating.signals import DraftSignals, Signals, confidence
from vllm_accel.speculate import Verdict

Choose = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`choices` of some heads."""

NO_ROOM = "no_room"
AHEAD = "ahead"
"""Reason of a request that wanted to draft in a step that must not."""


@dataclass(slots=True)
class StepReport:
    """What one step decided and learnt; travels from the worker to the scheduler."""

    req_ids: list[str] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    """Per request, the tokens to verify next."""
    gate: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by (state, reason): state is open or closed."""
    draft_lengths: Counter[int] = field(default_factory=Counter)
    """Requests by tokens drafted, 0 included."""
    drafted: int = 0
    """Draft tokens the target verified."""
    accepted: int = 0
    """Draft tokens it agreed with."""
    drafted_for: int = 0
    """Requests the heads ran for."""
    asked: int = 0
    """Requests the gate could open for."""
    wanted: int = 0
    """Requests the heads ran for, or would have if the step could draft."""
    draft_seconds: float = 0.0
    """Time spent in the gate and the heads."""

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


class CerberusDrafter:
    """Drafts for the requests whose gate is open; skips the heads when none is.

    Args:
        heads: in the target's dtype, on its device.
        embed: token ids [n] int64 -> their embeddings [n, hidden_size], the target's.
        lm_head: hidden states [n, hidden_size] -> logits [n, tokens that can be drafted],
            the target's own.
        gate: decides per request.
        compiled: makes a faster function of the one from states to drafts, which is plain
            torch.
        share: under tensor parallelism, makes every rank go by what rank 0 decides. Called
            on every step with what decides; the heads' products may wait for all ranks.
    """

    def __init__(
        self,
        heads: CerberusHeads,
        embed: Callable[[Tensor], Tensor],
        lm_head: Callable[[Tensor], Tensor],
        gate: LearningGate,
        *,
        compiled: Callable[[Choose], Choose] = lambda choose: choose,
        share: Callable[[Callable[[], list[int]]], list[int]] = lambda decide: decide(),
    ) -> None:
        self._reads_token = heads.reads_token
        self._embed = embed
        self._choose = compiled(partial(choices, heads, lm_head))
        self._gate = gate
        self._share = share
        self._is_due = False
        """The gate wants drafts; the steps until it can have them are on their way."""

    def warm_up(self, hidden_states: Tensor) -> None:
        """Runs the heads on states [num_reqs, hidden_size], their drafts for nobody."""
        none = torch.zeros(len(hidden_states), dtype=torch.int64)
        self._choices(hidden_states, none.to(hidden_states.device))

    def draft(
        self,
        requests: Decoding,
        hidden_states: Tensor,  # [num_rows, hidden_size]
        logits: Tensor,  # [num_rows, vocab]
        report: StepReport,
        *,
        may_draft: bool = True,
    ) -> list[list[int]]:
        """Draft tokens per request, at most as many as it has room for.

        Args:
            hidden_states: the target's, after its final norm.
            logits: the target's, at the same rows.
            report: gains this step's decisions.
            may_draft: False asks the gate, and runs no heads.
        """
        began = time.perf_counter()
        rows, room = requests.rows, requests.room
        drafts: list[list[int]] = [[] for _ in rows]
        decoding = [i for i, row in enumerate(rows) if row >= 0]
        able = [i for i in decoding if room[i] > 0]
        able_ids = [requests.req_ids[i] for i in able]
        signals = Signals(logits, [rows[i] for i in able], able_ids, len(decoding))
        wanted = self._share(lambda: self._wanted(able, signals, may_draft))
        report.asked, report.wanted = len(able), len(wanted)
        open_ = wanted if may_draft else []
        if open_:
            tokens = self._tokens(requests, open_, hidden_states)
            for i, token_ids in zip(open_, tokens, strict=True):
                drafts[i] = token_ids[: room[i]]
        self._count(report, len(decoding), len(able), len(open_))
        report.draft_lengths.update(len(drafts[i]) for i in decoding)
        report.drafted_for = len(open_)
        report.draft_seconds = time.perf_counter() - began
        return drafts

    def _wanted(self, able: list[int], signals: Signals, may_draft: bool) -> list[int]:
        if not able or (self._is_due and not may_draft):
            return able
        admitted = self._gate.admit(signals)
        wanted = [i for i, yes in zip(able, admitted, strict=True) if yes]
        self._is_due = bool(wanted) and not may_draft
        return wanted

    def _count(self, report: StepReport, decoding: int, able: int, opened: int) -> None:
        reason = self._gate.reason
        report.gate["open", reason] += opened
        report.gate["closed", reason] += able - report.wanted
        report.gate["closed", AHEAD] += report.wanted - opened
        report.gate["closed", NO_ROOM] += decoding - able

    def _tokens(
        self, requests: Decoding, open_: list[int], hidden_states: Tensor
    ) -> list[list[int]]:
        """Per open request, as many tokens as the gate wants verified."""
        device = hidden_states.device
        rows = torch.tensor([requests.rows[i] for i in open_], device=device)
        chosen = torch.tensor([requests.next_tokens[i] for i in open_], device=device)
        token_ids, sure = self._choices(hidden_states[rows], chosen)
        lengths = self._gate.lengths(DraftSignals(sure))
        drafts: list[list[int]] = token_ids.T.tolist()
        return [ids[:n] for ids, n in zip(drafts, lengths, strict=True)]

    def _choices(self, hidden_states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self._embed(chosen) if self._reads_token else None
        return self._choose(hidden_states, embeddings)


def choices(
    heads: CerberusHeads,
    lm_head: Callable[[Tensor], Tensor],
    hidden_states: Tensor,  # [num_reqs, hidden_size]
    embeddings: Tensor | None,  # [num_reqs, hidden_size] of the tokens chosen there
) -> tuple[Tensor, Tensor]:
    """Each head's first choice and how sure of it: token ids and float32.

    Returns:
        [draft_tokens, num_reqs] each.
    """
    logits = heads.logits(heads(hidden_states, embeddings), lm_head)
    # On CPU max() finds the place several times faster than argmax().
    best = logits.max(dim=-1)
    return heads.token_ids(best.indices), confidence(logits, best.values)
