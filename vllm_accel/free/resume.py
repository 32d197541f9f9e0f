"""Which rows of a batch have their shallow part done, and which have it still to do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_accel.free.stack import ExitStacks

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of a batch, told apart; both kinds ascend."""

    kept: Rows  # [kept] rows of the batch whose exit state is known
    states: Rows  # [kept] where in `ExitStacks.states` it is
    rest: Rows  # [rest] rows that go through all layers
    requests: Rows  # [num_lanes] places in the batch of requests with such rows
    lens: Rows  # [num_lanes] how many of them


def split(
    stacks: ExitStacks,
    req_ids: Sequence[str],
    starts: Sequence[
        int
    ],  # [num_reqs + 1] rows of request i are [starts[i], starts[i + 1])
    positions: Sequence[int],  # [num_reqs] index in the sequence of each first row
    token_ids: Rows,  # [num_rows]
) -> Split | None:
    """Tells rows apart by request, position and token id; None if no state is known.

    A request's rows are kept from the first one on, so the rest is its last tokens.
    """
    states: list[int] = []
    kept: list[int] = []
    first = np.array(starts[:-1], dtype=np.int64)
    for i, req_id in enumerate(req_ids):
        if req_id not in stacks:
            continue
        tokens = token_ids[starts[i] : starts[i + 1]].tolist()
        rows = stacks.kept_rows(req_id, positions[i], tokens)
        states += rows
        kept += range(starts[i], starts[i] + len(rows))
        first[i] += len(rows)
    if not kept:
        return None
    lens = np.array(starts[1:], dtype=np.int64) - first
    is_rest = np.ones(starts[-1], dtype=bool)
    is_rest[kept] = False
    requests = np.flatnonzero(lens)
    return Split(
        np.array(kept), np.array(states), np.flatnonzero(is_rest), requests, lens[requests]
    )
