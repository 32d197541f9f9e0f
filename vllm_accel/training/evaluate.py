"""Held-out figures of heads: how often they are right, and what a gate could use."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from vllm_accel.cerberus.checkpoint import SelfTest
from vllm_accel.gating.signals import entropy
from vllm_accel.looping import without_loop
from vllm_accel.training.data import IGNORED, Row, collate
from vllm_accel.training.model import FrozenBaseWithHeads, targets

_SELF_TEST_ROWS = 64
_BEST = 5
_PROMPT_TOKENS = 96
_CONTINUATION_TOKENS = 128
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Observations:
    """One line per held-out token at which every head has a target."""

    hidden_states: Tensor  # [tokens, hidden_size]
    token_ids: Tensor  # [tokens, 1 + draft_tokens] the next token, then the heads'
    top5: Tensor  # [tokens, draft_tokens, 5] the heads' best, best first
    entropy: Tensor  # [tokens] float32 nats, of the base

    @property
    def accepted(self) -> Tensor:
        """[tokens] int64: leading heads whose first choice is right."""
        agree = self.top5[..., 0].eq(self.token_ids[:, 1:])
        return agree.long().cumprod(dim=1).sum(dim=1)

    def top_k_share(self, k: int) -> list[float]:
        """Per head, the share of tokens found among its k best."""
        hits = self.top5[..., :k].eq(self.token_ids[:, 1:, None]).any(dim=-1)
        return [round(share, 4) for share in hits.float().mean(dim=0).tolist()]

    def self_test(self) -> SelfTest:
        """A small spread of lines to try the heads on wherever they are loaded."""
        step = max(1, len(self.entropy) // _SELF_TEST_ROWS)
        return SelfTest(self.hidden_states[::step], self.token_ids[::step])


class WithBase(Protocol):
    """Anything around a transformers causal language model."""

    base: Any


@torch.no_grad()
def continued(model: WithBase, rows: list[Row]) -> list[Row]:
    """Rows of text become the base's own greedy continuations of their beginnings.

    Rows that already are continuations stay. Acceptance on other text than the base's
    own would count only the places where it is easy to guess.
    """
    said = [row for row in rows if IGNORED in row["labels"]]
    texts = [row["input_ids"] for row in rows if IGNORED not in row["labels"]]
    longest = max(map(len, texts), default=0)
    length = max(1, min(_PROMPT_TOKENS, longest // 2))
    prompts = [ids[:length] for ids in texts if len(ids) >= length]
    for prompt, own in zip(prompts, greedy(model.base, prompts), strict=True):
        said.append(asked(prompt, without_loop(own)))
    return said


def asked(prompt: list[int], continuation: list[int]) -> Row:
    """A row whose targets are the continuation."""
    labels = [IGNORED] * len(prompt) + continuation
    return {"input_ids": prompt + continuation, "labels": labels}


@torch.no_grad()
def greedy(base: Any, prompts: list[list[int]]) -> Iterator[list[int]]:
    """The base's own next 128 tokens after each prompt; prompts are of one length."""
    for first in range(0, len(prompts), _ROWS_AT_ONCE):
        ids = torch.tensor(prompts[first : first + _ROWS_AT_ONCE], device=base.device)
        tokens = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_CONTINUATION_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        yield from tokens[:, ids.shape[1] :].tolist()


@torch.no_grad()
def observe(model: FrozenBaseWithHeads, rows: list[Row]) -> Observations:
    """Runs base and heads over held-out rows, keeping lines the base agrees with.

    Lines count where the base's own first choice is the text's next token: drafts are
    only ever made along what the base says.
    """
    parts = [_observe_row(model, row) for row in rows]
    return Observations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _observe_row(model: FrozenBaseWithHeads, row: Row) -> tuple[Tensor, ...]:
    batch = collate([row])
    heads = model.heads.draft_tokens
    device = next(model.heads.parameters()).device
    labels = batch["labels"].to(device)
    states = model.hidden_states(batch["input_ids"].to(device))
    logits = model.base.lm_head(states)[0]
    wanted = torch.stack([targets(labels, head)[0] for head in range(-1, heads)], dim=1)
    kept = (wanted != IGNORED).all(dim=1) & logits.argmax(dim=-1).eq(wanted[:, 0])
    states, logits, wanted = states[0, kept], logits[kept], wanted[kept]
    lm_head = model.heads.draftable_rows(model.base.lm_head.weight)
    after = model.base.get_input_embeddings()(wanted[:, 0])
    drafts = model.heads.logits(model.heads(states, after), partial(linear, weight=lm_head))
    best = drafts.topk(min(_BEST, drafts.shape[-1]), dim=-1).indices
    top5 = model.heads.token_ids(best)
    parts = (states.float(), wanted, top5.transpose(0, 1), entropy(logits))
    return tuple(part.cpu() for part in parts)


def best_entropy_threshold(seen: Observations, draft_cost: float) -> float:
    """Nats below which a draft step accepts more than it costs, on average.

    Args:
        draft_cost: extra time of a drafting step, in plain steps.

    Returns:
        The threshold with the greatest total gain, among the deciles of entropy.
    """
    gain = seen.accepted.float() - draft_cost
    candidates = torch.quantile(seen.entropy, torch.linspace(0.1, 1, 10)).tolist()
    totals = [float(gain[seen.entropy < nats].sum()) for nats in candidates]
    best = max(range(len(candidates)), key=totals.__getitem__)
    return round(float(max(candidates[best], 0.01)), 4)
