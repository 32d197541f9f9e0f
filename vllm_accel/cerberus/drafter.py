"""One drafting step: which requests draft, and what.

The engine's adapter says which requests have room and where their last accepted token
is; everything else is decided here, on plain tensors.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import LearningGate
from vllm_accel.gating.signals import DraftSignals, Signals
from vllm_accel.speculate import Verdict

NO_ROOM = "no_room"


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
    draft_seconds: float = 0.0
    """Time spent in the gate and the heads."""

    def add_verdict(self, verdict: Verdict) -> None:
        """Counts one verdict."""
        self.drafted += verdict.verified
        self.accepted += verdict.accepted


class CerberusDrafter:
    """Drafts for the requests whose gate is open; skips the heads when none is.

    Args:
        heads: in the target's dtype, on its device.
        lm_head: hidden states [n, hidden_size] -> logits [n, tokens that can be drafted],
            the target's own.
        gate: decides per request.
        share: under tensor parallelism, makes every rank go by what rank 0 decides. Called
            on every step with what decides; the heads' products may wait for all ranks.
    """

    def __init__(
        self,
        heads: CerberusHeads,
        lm_head: Callable[[Tensor], Tensor],
        gate: LearningGate,
        share: Callable[[Callable[[], list[int]]], list[int]] = lambda decide: decide(),
    ) -> None:
        self._heads = heads
        self._lm_head = lm_head
        self._gate = gate
        self._share = share

    def draft(
        self,
        req_ids: Sequence[str],
        rows: Sequence[int],
        room: Sequence[int],
        hidden_states: Tensor,  # [num_rows, hidden_size]
        logits: Tensor,  # [num_rows, vocab]
        report: StepReport,
    ) -> list[list[int]]:
        """Draft tokens per request, at most `room` of each.

        Args:
            req_ids: per request, its id.
            rows: per request, the row of its last accepted token; below 0 for a request
                that is not decoding yet.
            room: per request, tokens that may still be drafted.
            hidden_states: the target's, after its final norm.
            logits: the target's, at the same rows.
            report: gains this step's decisions.
        """
        began = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in rows]
        decoding = [i for i, row in enumerate(rows) if row >= 0]
        able = [i for i in decoding if room[i] > 0]
        signals = Signals(
            logits, [rows[i] for i in able], [req_ids[i] for i in able], len(decoding)
        )
        open_ = self._share(lambda: self._open(able, signals, report))
        if open_:
            picked = torch.tensor([rows[i] for i in open_], device=hidden_states.device)
            tokens = self._tokens(hidden_states[picked])
            for i, token_ids in zip(open_, tokens, strict=True):
                drafts[i] = token_ids[: room[i]]
        report.gate["closed", NO_ROOM] += len(decoding) - len(able)
        report.draft_lengths.update(len(drafts[i]) for i in decoding)
        report.drafted_for = len(open_)
        report.draft_seconds = time.perf_counter() - began
        return drafts

    def _open(self, able: list[int], signals: Signals, report: StepReport) -> list[int]:
        if not able:
            return []
        admitted = self._gate.admit(signals)
        open_ = [i for i, yes in zip(able, admitted, strict=True) if yes]
        report.gate["open", self._gate.reason] += len(open_)
        report.gate["closed", self._gate.reason] += len(able) - len(open_)
        return open_

    def _tokens(self, hidden_states: Tensor) -> list[list[int]]:
        """Per request, as many tokens as the gate wants verified."""
        logits = self._heads.logits(self._heads(hidden_states), self._lm_head)
        # On CPU max() finds the place several times faster than argmax().
        best = logits.max(dim=-1)
        lengths = self._gate.lengths(DraftSignals(logits, best.values))
        token_ids: list[list[int]] = self._heads.token_ids(best.indices).T.tolist()
        return [ids[:n] for ids, n in zip(token_ids, lengths, strict=True)]
