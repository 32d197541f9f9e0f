"""Aux Cache: where pruned tokens wait, each at the layer it has come to.

The paper keeps one cache per layer. A token waits at one layer only, the first it has not
passed, so one row per token holds the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class _Parked:
    """What of one request is parked."""

    layer_of: NDArray[np.int64]  # [num_tokens] layer a token waits for, or _NOWHERE
    slot_of: NDArray[np.int64]  # [num_tokens] where its row is
    free: list[int]
    """Slots of the request that hold nothing."""


class AuxCache:
    """Hidden states of pruned tokens.

    Args:
        store: [num_slabs, rows_per_slab, hidden_size] where rows lie: a slab is what one
            layer's part of a KV-cache block is used for here. Slot `s` is row
            `s % rows_per_slab` of slab `s // rows_per_slab`.
    """

    def __init__(self, store: Tensor) -> None:
        self._store = store
        self._requests: dict[str, _Parked] = {}

    def admit(self, req_id: str, num_tokens: int, slots: NDArray[np.int64]) -> None:
        """Gives a request room.

        Args:
            num_tokens: of its prompt.
            slots: of the store, its own until it is forgotten.
        """
        assert req_id not in self._requests, f"{req_id} has room already"
        nowhere = np.full(num_tokens, _NOWHERE, dtype=np.int64)
        self._requests[req_id] = _Parked(nowhere, nowhere.copy(), slots.tolist()[::-1])

    def forget(self, req_id: str) -> None:
        """Drops a request that finished, was preempted or aborted; unknown ones pass."""
        self._requests.pop(req_id, None)

    def park(
        self,
        req_id: str,
        positions: NDArray[np.int64],  # [num_rows] not parked yet
        layer: int,
        rows: Tensor,  # [num_rows, hidden_size] what goes into that layer
    ) -> None:
        """Lets tokens wait for the layer they have come to."""
        parked = self._requests[req_id]
        assert (parked.layer_of[positions] == _NOWHERE).all(), f"{positions} wait already"
        assert len(positions) <= len(parked.free), f"{req_id} has no room for {positions}"
        taken = [parked.free.pop() for _ in positions]
        parked.layer_of[positions] = layer
        parked.slot_of[positions] = taken
        self._store[self._index(taken)] = rows.to(self._store.dtype)

    def revive(
        self,
        req_id: str,
        positions: NDArray[np.int64],  # [num_rows] all waiting for `layer`
        layer: int,
    ) -> Tensor:
        """[num_rows, hidden_size] what goes into the layer; the tokens wait no more."""
        parked = self._requests[req_id]
        waiting = parked.layer_of[positions]
        assert (waiting == layer).all(), f"{positions} wait for {waiting}, not {layer}"
        taken = parked.slot_of[positions].tolist()
        parked.layer_of[positions] = _NOWHERE
        parked.free.extend(reversed(taken))
        return self._store[self._index(taken)]

    def num_parked(self, req_id: str) -> int:
        """Tokens of a request that wait."""
        return int((self._requests[req_id].layer_of != _NOWHERE).sum())

    def num_requests(self) -> int:
        """Requests that have room."""
        return len(self._requests)

    def _index(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(slots, dtype=torch.int64, device=self._store.device)
        rows = self._store.shape[1]
        return index // rows, index % rows
