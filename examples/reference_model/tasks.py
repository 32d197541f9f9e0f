"""Long-range tasks: find a value given earlier in the text, repeat what was said before.

A registry row is code with lines `REGISTRY["name"] = "123"` scattered in it, asked back
at its end: `assert REGISTRY["name"] == "123"`. Names are words of the vocabulary; one in
four of them never occurs in training tasks and is kept for `retrieval.py`.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

REPEATED_SHARE = 0.25
TEST_NAME_SHARE = 4


@dataclass(frozen=True, slots=True)
class Names:
    """Names, those of training and those of tests apart."""

    training: list[str]
    test: list[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Names":
        """Lower-case words of 4 to 10 letters in the vocabulary, without a space."""
        words = sorted(
            w for w in tokenizer.get_vocab() if w.isascii() and w.islower() and w.isalpha()
        )
        words = [w for w in words if 4 <= len(w) <= 10]
        test = words[::TEST_NAME_SHARE]
        return cls([w for w in words if w not in set(test)], test)


@dataclass(frozen=True, slots=True)
class TaskWriter:
    """Writes rows around pieces of `filler` ([tokens] uint16 token ids)."""

    tokenizer: Tokenizer
    filler: np.ndarray
    names: list[str]

    def row(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A training row.

        Returns:
            token ids and what is to be learnt of each ([length] bool): in a registry
            row the answers' digits are marked.
        """
        if rng.random() < REPEATED_SHARE:
            return self._repeated(length, rng), np.zeros(length, dtype=bool)
        keys = int(rng.integers(2, 5 + length // 256))
        return self._registry(length, keys, int(rng.integers(2, 9)), rng)

    def question(
        self, length: int, keys: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(prompt of exactly `length` - 3 token ids, the 3 token ids of the answer)."""
        ids, _ = self._registry(length + 2, keys, 1, rng)
        return ids[: length - 3], ids[length - 3 : length]

    def _repeated(self, length: int, rng: np.random.Generator) -> np.ndarray:
        size = int(rng.integers(20, length // 3))
        if rng.random() < 0.4:
            piece = rng.integers(10, self.tokenizer.get_vocab_size(), size=size)
        else:
            piece = self._piece(size, rng)
        return np.tile(piece, length // size + 1)[:length].astype(np.uint16)

    def _registry(
        self, length: int, keys: int, questions: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        names = rng.choice(self.names, size=keys, replace=False)
        values = {name: str(rng.integers(100, 1000)) for name in names}
        lines = [self._ids(f'\nREGISTRY["{n}"] = "{v}"\n') for n, v in values.items()]
        asked = rng.choice(names, size=questions)
        ends = [self._ids(f'\nassert REGISTRY["{n}"] == "{values[n]}"\n') for n in asked]
        rest = length - sum(map(len, lines)) - sum(map(len, ends))
        ids = np.concatenate([*self._scattered(lines, rest, rng), *ends])
        before = np.zeros(length - sum(map(len, ends)), dtype=bool)
        marks = [before, *(_digit_marks(end) for end in ends)]
        return ids.astype(np.uint16), np.concatenate(marks)

    def _scattered(
        self, lines: list[np.ndarray], filler: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """The lines at random places of one piece of filler."""
        cuts = np.sort(rng.integers(0, filler + 1, size=len(lines)))
        pieces = np.split(self._piece(filler, rng), cuts)
        mixed = [part for pair in zip(pieces, lines, strict=False) for part in pair]
        return [*mixed, pieces[-1]]

    def _piece(self, size: int, rng: np.random.Generator) -> np.ndarray:
        first = int(rng.integers(0, len(self.filler) - size))
        return np.asarray(self.filler[first : first + size])

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids)


def _digit_marks(question: np.ndarray) -> np.ndarray:
    """The answer's three digits: the line ends with them, `"` and a line break."""
    marks = np.zeros(len(question), dtype=bool)
    marks[-5:-2] = True
    return marks
