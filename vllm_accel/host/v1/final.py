"""Drafts that the deep layers do not correct: FREE's mode "exit"."""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor

from vllm_accel.free.stack import first_to_undo
from vllm_accel.host.v1.greedy import padded

OPT_OUT = "early_exit"
"""`SamplingParams(extra_args={"early_exit": False})`: this request's tokens go through
all layers."""
_NO = {"false", "0", "0.0"}  # over HTTP values are strings or numbers
QUALITY = "exit_quality"
"""`extra_args={"exit_quality": 0.95}`: share of its tokens that all layers should agree
with."""


def standing(
    logits: Tensor,  # [rows, vocab]
    rows: Tensor,  # [drafts] of each draft, the row that says what stands in its place
    token_ids: Tensor,  # [drafts]
    final: Sequence[Sequence[bool]],  # per request, of its drafts
    limit: float | None,
) -> Tensor:
    """[drafts] bool: which stand unverified, none from the first that surprises on.

    Args:
        limit: nats, see `FreeConfig.rollback`.
    """
    stands = torch.tensor([yes for own in final for yes in own], dtype=torch.bool)
    if limit is None:
        return stands
    chances = logits[rows.long()].float().log_softmax(dim=-1)
    surprise = -chances.gather(1, token_ids.long()[:, None])[:, 0]
    first = 0
    for own in surprise.split([len(drafts) for drafts in final]):
        undone = first_to_undo(own.tolist(), limit)
        stands[first + (len(own) if undone is None else undone) : first + len(own)] = False
        first += len(own)
    return stands


def sampled(
    deep_token_ids: Sequence[Sequence[int]],  # per request, of each of its rows
    token_ids: Sequence[int],  # [drafts] a request's drafts together
    stand: Sequence[bool],  # [drafts]
    num_drafts: Sequence[int],  # per request
) -> Tensor:
    """Drafts that stand or are the deep choice, up to the first that is neither.

    Returns:
        As `greedy.verified` does: the deep choice comes last.
    """
    drafts = iter(zip(token_ids, stand, strict=True))
    given = []
    for deep, count in zip(deep_token_ids, num_drafts, strict=True):
        own = zip(islice(drafts, count), deep, strict=False)
        kept = list(takewhile(_is_kept, list(own)))
        given.append([*(draft for (draft, _), _ in kept), deep[len(kept)]])
    return padded(given, 1 + max(num_drafts))


def _is_kept(row: tuple[tuple[int, bool], int]) -> bool:
    (draft, stands), deep = row
    return stands or draft == deep


def only_drafts(
    logits: Tensor,  # [rows, vocab]
    rows: Tensor,  # [drafts] of each draft, the row that says what stands in its place
    token_ids: Tensor,  # [drafts]
) -> Tensor:
    """[rows, vocab] in which these rows allow the draft alone, a copy."""
    logits = logits.clone()
    logits[rows.long()] = -torch.inf
    logits[rows.long(), token_ids.long()] = 0.0
    return logits


def quality(params: Any, usual: float) -> float:
    """What a request asks for, 1.0 where that is no share of its tokens.

    Args:
        usual: of requests that do not say.
    """
    asked = (params.extra_args or {}).get(QUALITY, usual)
    try:
        share = round(float(asked), 3)  # each share has a threshold of its own to learn
    except (TypeError, ValueError):
        return 1.0
    return share if 0 < share < 1 else 1.0


def allowed(params: Any) -> bool:
    """Whether a request's tokens are the largest logit's, and nobody asks for logprobs.

    A final draft is the shallow model's first choice: it follows no temperature, grammar,
    penalty, list of tokens, or least number of them.
    """
    wanted = str((params.extra_args or {}).get(OPT_OUT, True)).lower()
    edited = (
        params.structured_outputs
        or params.allowed_token_ids
        or params.bad_words
        or params.logit_bias
        or params.min_tokens
        or params.thinking_token_budget
    )
    penalised = (
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
    )
    return bool(
        wanted not in _NO
        and params.temperature == 0
        and params.logprobs is None
        and not params.logprob_token_ids
        and not edited
        and not penalised
    )
