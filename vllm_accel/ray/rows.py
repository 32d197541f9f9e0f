"""The books of a batch: which rows there are, which are done, where they are kept.

While a batch runs its answers stand in `OUTPUT.parts/`, one small parquet file after
another, each written whole. When all rows are there they become OUTPUT, and the folder
goes. So OUTPUT is complete if it exists, and what a stopped run had done is not lost.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow
from pyarrow import compute, parquet

from vllm_accel.bench.prompts import lines
from vllm_accel.errors import ConfigError

SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("text", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("prompt_tokens", pyarrow.int32()),
        ("output_tokens", pyarrow.int32()),
        ("error", pyarrow.string()),
    ]
)

_BOOK = "batch.json"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """The text of a conversation."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the input."""

    row: int
    """Its place among the lines that are not blank, from 0."""
    text: str
    """What was asked, as text; messages as JSON."""
    token_ids: list[int]
    sampling: Mapping[str, Any]
    """Keyword arguments of vLLM's SamplingParams."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row."""

    row: int
    text: str
    token_ids: list[int]
    prompt_tokens: int
    output_tokens: int
    error: str
    """Why the engine refused the row; "" for an answer."""


def read_prompts(
    file: Path, tokenizer: Tokenizer, sampling: Mapping[str, Any]
) -> list[Prompt]:
    """Prompts of a JSONL file: `prompt` or `messages`, and maybe `sampling_params`.

    Args:
        file: one JSON object per line.
        tokenizer: of the model, as vLLM uses it.
        sampling: what a line's own `sampling_params` are laid over.

    Raises:
        ConfigError: the file cannot be read, or a line is not as described.
    """
    prompts = []
    for row, (name, line) in enumerate(lines(file)):
        own = line.get("sampling_params", {})
        if not isinstance(own, dict):
            raise ConfigError(
                f"{name} has sampling_params={own!r:.60}: expected an object; mend it."
            )
        text, token_ids = _asked(name, line, tokenizer)
        prompts.append(Prompt(row, text, token_ids, {**sampling, **own}))
        _check_alike(name, prompts)
    return prompts


def _check_alike(name: str, prompts: Sequence[Prompt]) -> None:
    """Ray Data keeps rows in tables, where a key that one row has is None in the others,
    and None is not what vLLM would have taken without it."""
    first, last = (_keys(prompts[place].sampling) for place in (0, -1))
    if first != last:
        raise ConfigError(
            f"{name} has other keys in sampling_params than the first line "
            f"({', '.join(sorted(first ^ last))}): expected the same in every line; write "
            "vLLM's default where a line has no value of its own."
        )


def _keys(value: object, path: str = "") -> set[str]:
    """Every key of an object, those of objects in it by their path."""
    if not isinstance(value, Mapping):
        return {path}
    return {
        key for name, v in value.items() for key in _keys(v, f"{path}.{name}".strip("."))
    }


def _asked(
    name: str, line: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[str, list[int]]:
    prompt, messages = line.get("prompt"), line.get("messages")
    if isinstance(prompt, str) and messages is None and prompt:
        return prompt, tokenizer.encode(prompt)
    if isinstance(messages, list) and prompt is None and messages:
        return json.dumps(messages), _chat(name, messages, tokenizer)
    raise ConfigError(
        f"{name} has the keys {', '.join(line) or 'none'}: expected either `prompt`, a "
        "text that is not empty, or `messages`, a list as in the chat API; mend the line."
    )


def _chat(name: str, messages: list[Any], tokenizer: Tokenizer) -> list[int]:
    """As vLLM's chat API does: the template brings its own special tokens."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"{name} does not go through the model's chat template ({error}): expected "
            "messages it knows; mend the line or use `prompt`."
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)


class Parts:
    """Answers written so far.

    Args:
        output: the file all answers become.
        book: what the batch is; a batch is only gone on with under the same book.

    Raises:
        ConfigError: what was begun there is another batch.
    """

    def __init__(self, output: Path, book: Mapping[str, Any]) -> None:
        self._output = output
        self._folder = output.with_name(f"{output.name}.parts")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {output} cannot be written ({error}): expected a file in a "
                "folder where files can be made; name another."
            ) from error
        self._check_book(dict(book))
        self._number = 1 + max(map(_number, self._files()), default=0)
        self.done = {row for file in self._files() for row in _rows(file)}
        """Rows that have an answer or an error."""

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps outcomes; a row that is there already keeps its first."""
        new = {o.row: o for o in outcomes if o.row not in self.done}
        if not new:
            return
        table = pyarrow.Table.from_pylist([asdict(o) for o in new.values()], SCHEMA)
        _write(self._folder / f"part-{self._number:06d}.parquet", table)
        self._number += 1
        self.done |= new.keys()

    def finish(self, prompts: Sequence[Prompt]) -> int:
        """Makes the output of all parts, in the order of the input.

        Returns:
            How many rows have an error instead of an answer.
        """
        tables = [parquet.read_table(file, schema=SCHEMA) for file in self._files()]
        table = pyarrow.concat_tables(tables).sort_by("row")
        asked = pyarrow.array([p.text for p in prompts], pyarrow.string())
        table = table.add_column(1, "prompt", asked)
        _write(self._output, table)
        shutil.rmtree(self._folder)
        return int(compute.sum(compute.not_equal(table["error"], "")).as_py() or 0)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet"))

    def _check_book(self, book: dict[str, Any]) -> None:
        """A batch without an answer yet has not begun."""
        file = self._folder / _BOOK
        if not self._files():
            part = file.with_suffix(".part")
            part.write_text(json.dumps(book, indent=2))
            part.replace(file)
            return
        begun = json.loads(file.read_text())
        wrong = sorted(key for key in book if begun.get(key) != book[key])
        if wrong:
            raise ConfigError(
                f"{self._folder} holds another batch (other {', '.join(wrong)}): expected "
                "the same to go on with; delete the folder or name another --output."
            )


def check_new(output: Path) -> None:
    """Refuses an output that is there, which is a batch that is complete.

    Raises:
        ConfigError: the file exists.
    """
    if output.exists():
        raise ConfigError(
            f"--output {output} exists already: expected a new file; delete it or name "
            "another."
        )


def book_of(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two batches the same: the input's content, and the settings."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = json.loads(json.dumps(settings, default=str))
    return {"input": digest, **settings}


def waiting(prompts: Sequence[Prompt], done: set[int]) -> list[Prompt]:
    """The prompts that have no outcome yet."""
    return [prompt for prompt in prompts if prompt.row not in done]


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("part-"))


def _rows(file: Path) -> Iterator[int]:
    yield from parquet.read_table(file, columns=["row"])["row"].to_pylist()


def _write(file: Path, table: Any) -> None:
    """Writes a file that is whole or not there."""
    partial = file.with_name(f"{file.name}.partial")
    parquet.write_table(table, partial)
    os.replace(partial, file)
