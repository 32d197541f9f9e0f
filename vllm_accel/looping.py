"""Text that goes round in circles: small models end in it, and it flatters drafting."""

from collections.abc import Sequence

WINDOW = 64
LEAST_DISTINCT = 16
_GRAM = 4


def loops(token_ids: Sequence[int]) -> bool:
    """Whether the last 64 tokens hold fewer than 16 distinct 4-grams.

    Shorter texts never count as looping.
    """
    window = token_ids[-WINDOW:]
    grams = {tuple(window[i : i + _GRAM]) for i in range(len(window) - _GRAM + 1)}
    return len(window) == WINDOW and len(grams) < LEAST_DISTINCT


def without_loop(token_ids: list[int]) -> list[int]:
    """The tokens up to the middle of the first window that loops."""
    for stop in range(WINDOW, len(token_ids) + 1, 16):
        if loops(token_ids[:stop]):
            return token_ids[: stop - WINDOW // 2]
    return token_ids
