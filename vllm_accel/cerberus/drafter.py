"""One drafting step: which requests draft, and what.

The engine's adapter says which requests have room and where their last accepted token
is; everything else is decided here, on plain tensors.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import LearningGate
from vllm_accel.gating.signals import DraftSignals, Signals, confidence
from vllm_accel.speculate import Decoding, Opening, Share, StepReport, alone

Choose = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`choices` of some heads."""


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
        share: see `Opening`; of the drafts too, which stay with the workers and have to
            be the same tokens in each.
    """

    def __init__(
        self,
        heads: CerberusHeads,
        embed: Callable[[Tensor], Tensor],
        lm_head: Callable[[Tensor], Tensor],
        gate: LearningGate,
        *,
        compiled: Callable[[Choose], Choose] = lambda choose: choose,
        share: Share = alone,
    ) -> None:
        self._reads_token = heads.reads_token
        self._embed = embed
        self._choose = compiled(partial(choices, heads, lm_head))
        self._gate = gate
        self._share = share
        self._opening = Opening(share)

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
        drafts: list[list[int]] = [[] for _ in requests.rows]

        def admit(able: list[int], decoding: int) -> list[bool]:
            rows = [requests.rows[i] for i in able]
            ids = [requests.req_ids[i] for i in able]
            return self._gate.admit(Signals(logits, rows, ids, decoding))

        open_ = self._opening.requests(
            requests, admit, self._gate.reason, report, may_draft=may_draft
        )
        if open_:
            chosen = self._tokens(requests, open_, hidden_states)
            tokens = self._share(lambda: chosen)
            for i, token_ids in zip(open_, tokens, strict=True):
                drafts[i] = token_ids[: requests.room[i]]
        report.draft_lengths.update(
            len(draft) for draft, row in zip(drafts, requests.rows, strict=True) if row >= 0
        )
        report.draft_seconds = time.perf_counter() - began
        return drafts

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
