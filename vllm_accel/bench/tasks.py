"""Questions whose answers stand somewhere in a long prompt, and whether they were right.

Lines `REGISTRY["name"] = "123"` are scattered in source text of the standard library and
one is asked back at the end: `assert REGISTRY["name"] == "`.
"""

import random
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_accel.bench import prompts
from vllm_accel.bench.engine import TokenIds, Tokenizer
from vllm_accel.errors import ConfigError

FILLER_CHARACTERS = 4_000_000
_BLOCK = 4096
_WORD = re.compile(r"[a-z]{4,10}")
_MARKS = "\u0120\u2581"
"""What byte-level and SentencePiece tokenizers put before a word for its space."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its answer, and the most tokens an answer may take."""

    token_ids: TokenIds
    answer: str
    max_tokens: int


def is_right(question: Question, said: str) -> bool:
    """Whether the text begins with the whole answer; spaces before it do not count."""
    return re.match(re.escape(question.answer) + r"(?!\w)", said.lstrip()) is not None


def read(file: Path, tokenizer: Tokenizer) -> list[Question]:
    """Questions of a JSONL file of `prompt` and `answer`.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line lacks a text.
    """
    return [_given(name, line, tokenizer) for name, line in prompts.lines(file)]


def _given(name: str, line: dict[str, Any], tokenizer: Tokenizer) -> Question:
    prompt, answer = line.get("prompt"), line.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
        raise ConfigError(
            f"{name} has keys {sorted(line)}: expected texts under `prompt` and `answer`; "
            "mend the line."
        )
    return _question(tokenizer, prompt, answer.strip())


def _question(tokenizer: Tokenizer, prompt: str, answer: str) -> Question:
    """Room for a space before the answer, and for what shows where it ends."""
    room = len(tokenizer.encode(answer, add_special_tokens=False)) + 2
    return Question(tokenizer.encode(prompt), answer, room)


def made(tokenizer: Tokenizer, length: int, count: int) -> list[Question]:
    """The same questions on every call.

    Args:
        tokenizer: the model's.
        length: tokens of prompt and answer together, reached but for a few.
        count: questions.

    Raises:
        ConfigError: the length is too short for a task, or the vocabulary has no words.
    """
    rng = random.Random(length)
    names = _names(tokenizer)
    return [_made(tokenizer, length, names, rng) for _ in range(count)]


def _made(
    tokenizer: Tokenizer, length: int, names: list[str], rng: random.Random
) -> Question:
    """Cuts filler until the prompt fits: joined texts do not have the sum's tokens."""
    chosen = rng.sample(names, min(len(names), rng.randint(2, 4 + length // 256)))
    values = {name: str(rng.randint(100, 999)) for name in chosen}
    asked, places = rng.choice(chosen), rng.random()
    filler = _filler_ids(tokenizer, length, rng)
    while filler:
        text = _text(tokenizer.decode(filler), values, asked, random.Random(places))
        question = _question(tokenizer, text, values[asked])
        excess = len(question.token_ids) + question.max_tokens - length
        if excess <= 0:
            return question
        filler = filler[:-excess]
    raise ConfigError(
        f"--prompt-lengths has {length}, too short for a task with {len(chosen)} names: "
        "expected 256 or more; raise it."
    )


def _filler_ids(tokenizer: Tokenizer, count: int, rng: random.Random) -> TokenIds:
    """Source text from a random place on; in blocks, as tokenizers warn of long texts."""
    text, token_ids = _filler(), list[int]()
    at = rng.randrange(len(text))
    while len(token_ids) < count:
        block = text[at : at + _BLOCK]
        token_ids += tokenizer.encode(block, add_special_tokens=False)
        at = (at + _BLOCK) % len(text)
    return token_ids[:count]


def _text(filler: str, values: dict[str, str], asked: str, rng: random.Random) -> str:
    lines = filler.splitlines(keepends=True)
    for name, value in values.items():
        line = f'REGISTRY["{name}"] = "{value}"\n'
        lines.insert(rng.randint(0, max(0, len(lines) - 1)), line)
    return "".join(lines) + f'\nassert REGISTRY["{asked}"] == "'


def _names(tokenizer: Tokenizer) -> list[str]:
    """Words of 4 to 10 letters of the vocabulary, sorted."""
    words = {token.lstrip(_MARKS) for token in tokenizer.get_vocab()}
    names = sorted(word for word in words if _WORD.fullmatch(word))
    if len(names) < 2:
        raise ConfigError(
            "The model's vocabulary has no words of 4 to 10 small letters: expected some "
            "to make tasks with; give tasks of your own with --tasks."
        )
    return names


@cache
def _filler() -> str:
    """Source text of the standard library, 4 MB of it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for file in sorted(folder.glob("*.py")):
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size > FILLER_CHARACTERS:
            break
    return "".join(parts)
