"""How much the last token looks at every other, and who is kept for it."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool1d

from vllm_accel.paging import num_pages

Scorer = Callable[[Tensor, int], NDArray[np.float32]]
"""Tokens' importance [context_len] and tokens in a unit, to units' [num_units]."""

_SEED = 0


def attention_paid(
    query: Tensor,  # [num_rows, num_heads, head_dim] of the last tokens, after rotary
    keys: Tensor,  # [context_len, num_kv_heads, head_dim] of all they see, themselves too
    scale: float,
) -> Tensor:
    """Importance of every token: the attention the last ones pay it, mean over heads.

    Paper, equation 1, with one row; of more the mean. Heads that share a key head stand
    side by side, as in vLLM. Under tensor parallelism this is a rank's share: average
    over ranks.

    Returns:
        [context_len] float32, sums to 1.
    """
    num_rows = len(query)
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("rkgd,ckd->kgrc", grouped, keys.float()) * scale
    later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., -num_rows:].masked_fill_(later, -math.inf)
    return logits.softmax(dim=-1).mean(dim=(0, 1, 2))


def spread(
    importance: Tensor,  # [context_len]
    reach: int,
) -> Tensor:
    """[context_len]: of every token the most that it, or one within reach, is paid.

    What is read next stands beside what is looked at now, maybe on the next page. Tokens
    are neighbours as they lie, with what was left out between them left out.
    """
    if not reach:
        return importance
    return max_pool1d(importance[None], 2 * reach + 1, stride=1, padding=reach)[0]


def pooled(
    importance: Tensor,  # [context_len] float32
    unit: int,
    pooling: str,
) -> NDArray[np.float32]:
    """[num_units] importance of units; of the last one, as far as it is filled.

    Args:
        unit: tokens that are kept or pruned as one.
        pooling: "mean" or "max".
    """
    values = importance.float().cpu().numpy()
    firsts = np.arange(0, len(values), unit)
    found: NDArray[np.float32]
    if pooling == "max":
        found = np.maximum.reduceat(values, firsts)
    else:
        filled = np.minimum(unit, len(values) - firsts)
        found = np.add.reduceat(values, firsts) / filled.astype(np.float32)
    return found


def scorer(choose: str, pooling: str, reach: int = 0) -> Scorer:
    """What makes units' importance of their tokens'.

    Args:
        choose: "attention", or "random" for numbers that have nothing to do with it: the
            same on every rank, as all of them draw for the same units in the same order.
        pooling: see `pooled`.
        reach: see `spread`.
    """
    if choose == "attention":
        return lambda importance, unit: pooled(spread(importance, reach), unit, pooling)
    rng = np.random.default_rng(_SEED)
    return lambda importance, unit: rng.random(
        num_pages(len(importance), unit), dtype=np.float32
    )


def most_important(
    importance: NDArray[np.float32],  # [n]
    always: NDArray[np.bool_],  # [n]
    count: int,
) -> NDArray[np.bool_]:
    """[n] True for `count` entries: those always kept, then the most important.

    Of equals the earlier is kept, so that every rank keeps the same.
    """
    order = np.lexsort((np.arange(len(importance)), -importance, ~always))
    chosen = np.zeros(len(importance), dtype=np.bool_)
    chosen[order[:count]] = True
    return chosen
