"""How much the last token looks at every other, and who is kept for it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def last_row_probabilities(
    query: Tensor,  # [num_heads, head_dim] of the last token, after rotary
    keys: Tensor,  # [context_len, num_kv_heads, head_dim] of all it sees, itself included
    scale: float,
) -> Tensor:
    """Importance of every token: the attention the last one pays it, mean over heads.

    Paper, equation 1. Heads that share a key head stand side by side, as in vLLM. Under
    tensor parallelism this is a rank's share: average over ranks.

    Returns:
        [context_len] float32, sums to 1.
    """
    grouped = query.float().unflatten(0, (keys.shape[1], -1))
    logits = torch.einsum("kgd,ckd->kgc", grouped, keys.float()) * scale
    return logits.softmax(dim=-1).mean(dim=(0, 1))


def pooled(
    importance: Tensor,  # [context_len] float32
    page_tokens: int,
    pooling: str,
) -> NDArray[np.float32]:
    """[num_pages] importance of pages; of the last one, as far as it is filled.

    Args:
        page_tokens: tokens in a page.
        pooling: "mean" or "max".
    """
    values = importance.float().cpu().numpy()
    firsts = np.arange(0, len(values), page_tokens)
    found: NDArray[np.float32]
    if pooling == "max":
        found = np.maximum.reduceat(values, firsts)
    else:
        filled = np.minimum(page_tokens, len(values) - firsts)
        found = np.add.reduceat(values, firsts) / filled.astype(np.float32)
    return found


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
