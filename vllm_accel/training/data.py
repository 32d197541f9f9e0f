"""Files -> rows of token ids.

`.jsonl` lines are `{"text": ...}` or continuations `{"prompt_ids": ..., "token_ids":
...}`, where only the continuation is a target; any other file is read as text.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_accel.errors import ConfigError

IGNORED = -100
"""Label of a token no head is asked for."""

Row = dict[str, list[int]]
"""{"input_ids", "labels"}: labels are the same ids, `IGNORED` where no target."""


def read_rows(files: Iterable[Path], tokenizer: Any, row_tokens: int) -> list[Row]:
    """Rows of at most `row_tokens` tokens from every file.

    Raises:
        ConfigError: a line is not what it should be.
    """
    rows: list[Row] = []
    for file in files:
        source = _json_rows if file.suffix == ".jsonl" else _text_rows
        rows += source(file, tokenizer, row_tokens)
    return rows


def check_files(files: Iterable[Path]) -> None:
    """Refuses files that are not there.

    Raises:
        ConfigError: naming the first one.
    """
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"No training file {file}: expected text files or .jsonl; check --data."
            )


def split(rows: list[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), shuffled by `seed`.

    Raises:
        ConfigError: there are too few rows to hold one out.
    """
    rows = rows.copy()
    random.Random(seed).shuffle(rows)
    held_out = min(held_out, max(1, len(rows) // 10))
    if len(rows) <= held_out:
        raise ConfigError(
            f"The training files give {len(rows)} rows: expected at least 2, one of them "
            "held out; give more text with --data."
        )
    return rows[held_out:], rows[:held_out]


def most_frequent(rows: list[Row], count: int) -> Tensor:
    """[count] int64, ascending: the ids that are labels most often."""
    seen = Counter(t for row in rows for t in row["labels"] if t != IGNORED)
    return torch.tensor(sorted(token for token, _ in seen.most_common(count)))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """{"input_ids", "labels"}: [rows, longest] int64, padded at the end.

    Padding needs no mask: attention is causal, and padded labels are ignored.
    """
    return {
        "input_ids": _padded([row["input_ids"] for row in rows], 0),
        "labels": _padded([row["labels"] for row in rows], IGNORED),
    }


def _padded(lists: list[list[int]], fill: int) -> Tensor:
    tensors = [torch.tensor(ids) for ids in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)


def _text_rows(file: Path, tokenizer: Any, row_tokens: int) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8", errors="replace")
    yield from _windows(_ids(tokenizer, text), row_tokens)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False).input_ids  # quiet about long texts
    return ids


def _json_rows(file: Path, tokenizer: Any, row_tokens: int) -> Iterator[Row]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                if "text" in item:
                    yield from _windows(_ids(tokenizer, item["text"]), row_tokens)
                else:
                    yield from _continuation(item, row_tokens)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{file} line {number} is not a training row ({error!r}): expected "
                    '{"text": ...} or {"prompt_ids": [...], "token_ids": [...]}.'
                ) from error


def _continuation(item: dict[str, list[int]], row_tokens: int) -> Iterator[Row]:
    prompt, said = item["prompt_ids"], item["token_ids"]
    if not all(type(token) is int and token >= 0 for token in prompt + said):
        raise ValueError("token ids are whole numbers from 0")
    labels = [IGNORED] * len(prompt) + said
    if len(said) > 1:
        ids = prompt + said
        yield {"input_ids": ids[-row_tokens:], "labels": labels[-row_tokens:]}


def _windows(ids: list[int], row_tokens: int) -> Iterator[Row]:
    for first in range(0, len(ids), row_tokens):
        window = ids[first : first + row_tokens]
        if len(window) > 1:
            yield {"input_ids": window, "labels": window}
