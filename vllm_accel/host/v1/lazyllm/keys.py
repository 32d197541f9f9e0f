"""Reading keys back out of vLLM's KV cache on CPU, however an instruction set lays them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DIGIT = 128  # whole numbers up to here are exact in every dtype of a cache


class KeyLayout:
    """Where the elements of a key lie within a page.

    The attention kernels store keys transposed or packed, by instruction set. Which way
    is found out by writing a page of numbers and looking where they went.

    Args:
        layer: an attention layer whose metadata builder has been made.
        block_size: tokens in a page.
        dtype: of the cache.
    """

    def __init__(self, layer: Any, block_size: int, dtype: torch.dtype) -> None:
        self._shape = (block_size, layer.head_size)
        tokens = torch.arange(block_size)[:, None].expand(self._shape)
        dims = torch.arange(layer.head_size)[None, :].expand(self._shape)
        probe = _Probe(layer, dtype)
        lies = probe.where(tokens) * layer.head_size + probe.where(dims)
        place = torch.empty_like(lies)
        place[lies] = torch.arange(lies.numel())
        assert torch.equal(lies[place], torch.arange(lies.numel())), (
            "keys are not all there"
        )
        self._place = place.view(self._shape)
        """[block_size, head_size] offset in the page of one head."""
        self._strides = _strides(self._place)

    def keys(
        self,
        kv_cache: Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        blocks: Tensor,  # [num_pages] int
        seq_len: int,
    ) -> Tensor:
        """[seq_len, num_kv_heads, head_size] keys of the pages, in their order."""
        block_size, head_size = self._shape
        stored = _stored_keys(kv_cache, block_size * head_size)[blocks.long()]
        num_pages, num_heads, size = stored.shape
        if self._strides is None:
            pages = stored[:, :, self._place.flatten()].view(
                num_pages, num_heads, *self._shape
            )
        else:
            pages = stored.as_strided(
                (num_pages, num_heads, *self._shape),
                (num_heads * size, size, *self._strides),
            )
        return pages.transpose(1, 2).flatten(0, 1)[:seq_len]


class _Probe:
    """Writes one page through a layer, and reads it raw."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self._layer = layer
        self._dtype = dtype

    def where(self, numbers: Tensor) -> Tensor:
        """[block_size * head_size] int64 the numbers, in the order they are stored in.

        Args:
            numbers: [block_size, head_size] below 128 * 128, one for every element.
        """
        high, low = self._stored(numbers // _DIGIT), self._stored(numbers % _DIGIT)
        return high * _DIGIT + low

    def _stored(self, numbers: Tensor) -> Tensor:
        block_size, head_size = numbers.shape
        heads = self._layer.num_kv_heads
        key = numbers[:, None].expand(-1, heads, -1).to(self._dtype).contiguous()
        cache = torch.zeros(1, heads, block_size, 2 * head_size, dtype=self._dtype)
        slots = torch.arange(block_size)
        update: Callable[..., None] = self._layer.impl.do_kv_cache_update
        update(self._layer, key, torch.zeros_like(key), cache, slots)
        return _stored_keys(cache, numbers.numel())[0, 0].long()


def _stored_keys(kv_cache: Tensor, size: int) -> Tensor:
    """[num_blocks, num_kv_heads, size] keys as stored: they come before the values."""
    return kv_cache.flatten(2)[:, :, :size]


def _strides(place: Tensor) -> tuple[int, int] | None:
    """Strides that say the same, if any do: then a view is enough."""
    strides = int(place[1, 0] - place[0, 0]), int(place[0, 1] - place[0, 0])
    tokens, dims = (torch.arange(n) for n in place.shape)
    strided = tokens[:, None] * strides[0] + dims * strides[1]
    return strides if torch.equal(strided, place) else None
