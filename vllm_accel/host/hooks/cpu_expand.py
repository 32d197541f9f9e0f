"""Hook on `rejection_sampler.expand_batch_to_tokens`, on CPU: sampling follows the target.

vLLM 0.32's CPU kernel behind it writes into an int64 copy of its output, which nobody
copies back: temperature, top-k and top-p of the drafted rows stay uninitialised memory,
and sampled tokens follow no distribution at all (any speculative method, temperature
above 0). Batches in which every request is greedy do not pass here; a greedy request
beside a sampled one does, and may get another token.
"""

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler

_original = rejection_sampler.expand_batch_to_tokens


def apply() -> None:
    """Replaces the function in the rejection sampler's module."""
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def remove() -> None:
    """Puts the original back."""
    rejection_sampler.expand_batch_to_tokens = _original


def expand_batch_to_tokens(
    x: Tensor,  # [batch_size]
    cu_num_tokens: Tensor,  # [batch_size]
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """[num_tokens]: each request's value once per token, as the original documents it."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)
