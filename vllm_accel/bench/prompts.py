"""Prompts of a decode bench: from a file, or random token ids."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vllm_accel.bench.engine import TokenIds, Tokenizer
from vllm_accel.errors import ConfigError

SYNTHETIC_TOKENS = 128
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids, and where it came from: `FILE:LINE`."""

    name: str
    token_ids: TokenIds


def read(file: Path, encode: Callable[[str], TokenIds]) -> list[Prompt]:
    """Prompts of a JSONL file: `prompt`, or the first of Spec-Bench's `turns`.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has neither key.
    """
    return [Prompt(name, encode(_text(name, line))) for name, line in lines(file)]


def lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(`FILE:LINE`, object) of each line that is not blank.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is not a JSON object.
    """
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): expected a JSONL file; check its path."
        ) from error
    numbered = [(f"{file}:{n}", text) for n, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise ConfigError(f"{file} is empty: expected a JSON object per line; fill it.")
    return [(name, _object(name, text)) for name, text in numbered]


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {text!r:.60}: expected a JSON object; mend the line.")
    return value


def _text(name: str, line: dict[str, Any]) -> str:
    turns = line.get("turns")
    text = line.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"{name} has keys {sorted(line)}: expected a text under `prompt`, or a list "
            "of texts under `turns`; mend the line."
        )
    return text


def synthetic(tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """The same random prompts on every call, 128 tokens each, special tokens left out."""
    rng = random.Random(0)
    special = set(tokenizer.all_special_ids)
    usable = [token for token in range(tokenizer.vocab_size) if token not in special]
    drawn = (rng.choices(usable, k=SYNTHETIC_TOKENS) for _ in range(count))
    return [Prompt(f"synthetic:{n}", ids) for n, ids in enumerate(drawn, 1)]


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, max_model_len: int) -> None:
    """Raises ConfigError if the longest prompt and its answer do not fit the model."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) + max_tokens > max_model_len:
        raise ConfigError(
            f"{longest.name} has {len(longest.token_ids)} tokens and the answer "
            f"{max_tokens}: expected {max_model_len} at most together; raise "
            "--max-model-len or leave the prompt out."
        )


def rotated(items: Sequence[_T], first: int, count: int) -> list[_T]:
    """`count` items from the `first` on; after the last comes the first again."""
    return [items[(first + i) % len(items)] for i in range(count)]


def batches(items: Sequence[_T], batch_size: int) -> list[list[_T]]:
    """The items in batches; the last one may be smaller."""
    return [list(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
