"""Aux Cache rows in blocks of the KV-cache pool: a block's part of every layer is used."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class AuxBlocks:
    """Blocks of the pool, seen as rows of hidden states.

    Args:
        layers: caches [num_blocks, ...] of the layers of the widest group, which lie one
            behind the other in one piece of memory.
        hidden_size: of the rows.
    """

    def __init__(self, layers: Sequence[Tensor], hidden_size: int) -> None:
        first = layers[0]
        self._num_blocks = first.shape[0]
        self._num_layers = len(layers)
        page = first.stride(0)
        self._rows = rows_per_page(page, hidden_size)
        starts = [layer.storage_offset() - first.storage_offset() for layer in layers]
        apart = [i * self._num_blocks * page for i in range(len(layers))]
        assert starts == apart, f"layers lie at {starts}, not at {apart}"
        self.store = first.as_strided(
            (self._num_layers * self._num_blocks, self._rows, hidden_size),
            (page, hidden_size, 1),
            first.storage_offset(),
        )
        """[num_layers * num_blocks, rows, hidden_size], see `aux_cache.AuxCache`."""

    def slots(self, blocks: Sequence[int]) -> NDArray[np.int64]:
        """[num_blocks * num_layers * rows] of the store, of some blocks."""
        layers = np.arange(self._num_layers)[:, None] * self._num_blocks
        slabs = (layers + np.asarray(blocks, dtype=np.int64)).reshape(-1, 1)
        slots: NDArray[np.int64] = (slabs * self._rows + np.arange(self._rows)).ravel()
        return slots


def rows_per_page(page_elements: int, hidden_size: int) -> int:
    """Hidden states that fit where one layer keeps a page's keys and values."""
    return page_elements // hidden_size
