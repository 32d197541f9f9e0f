"""`bench prefill`: time to the first token of several methods, and are they still right?

One request at a time; methods take turns round by round. `dense_again` is the
dense engine asked a second time: what noise alone does to a ratio.
"""

import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_accel.bench import results, tasks
from vllm_accel.bench.engine import Engine, Tokenizer
from vllm_accel.bench.results import Row
from vllm_accel.bench.tasks import Question
from vllm_accel.errors import ConfigError

AGAIN = "dense_again"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one method did with one question."""

    ttft_ms: float
    """From handing over the prompt to its first token."""
    total_ms: float
    """To the last."""
    is_right: bool
    held: float
    """Most of the KV-cache pool in use while decoding, as a share; 0 if not known."""


Round = dict[str, list[Answer]]

Strip = dict[str, str]
"""By span of layers, a character per page; see `strip`."""

_Time = Callable[[Answer], float]


class PrefillBench:
    """One run over engines that are up.

    Args:
        engines: by method, `dense` first.
        tokenizer: the model's.
        rounds: each asks its share of the questions.
        progress: called with the number of answers since its last call.
        max_tokens: of every answer; None ends where the answer can be judged.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizer: Tokenizer,
        rounds: int,
        progress: Callable[[int], object],
        max_tokens: int | None = None,
    ) -> None:
        self._turns = {**engines, AGAIN: engines["dense"]}
        self._tokenizer = tokenizer
        self._rounds = rounds
        self._progress = progress
        self._max_tokens = max_tokens

    def rows(self, groups: Sequence[Sequence[Question]]) -> Iterator[list[Row]]:
        """The rows of one group of questions after the other."""
        for questions in groups:
            seen = {name: self._seen(name, questions[0]) for name in self._turns}
            self._round(questions[:1])  # not counted
            shares = [questions[n :: self._rounds] for n in range(self._rounds)]
            rounds = [self._round(share) for share in shares]
            length = round(statistics.fmean(len(q.token_ids) for q in questions))
            yield [
                {"method": name, "prompt_length": length}
                | row(name, rounds)
                | ({} if self._max_tokens is None else whole_answers(name, rounds))
                | {"kv_pages_formula": engine.pages_ratio(length)}
                | seen[name]
                for name, engine in self._turns.items()
            ]

    def _seen(self, name: str, question: Question) -> Row:
        """What a method keeps of a prompt, before decoding brings any of it back."""
        engine = self._turns[name]
        engine.reset_prefix_cache()
        engine.run([question.token_ids], [{"temperature": 0.0, "max_tokens": 1}])
        self._progress(1)
        pages = engine.pages_run()
        if pages is None:
            return {"strip": None, "rows_run": None}
        means = {span: statistics.fmean(shares) for span, shares in pages.items()}
        return {"strip": strip(pages), "rows_run": means}

    def _round(self, questions: Sequence[Question]) -> Round:
        said: Round = {}
        for name, engine in self._turns.items():
            said[name] = [self._ask(engine, question) for question in questions]
            engine.rest()
        return said

    def _ask(self, engine: Engine, question: Question) -> Answer:
        engine.reset_prefix_cache()
        steps = engine.run([question.token_ids], [self._sampling(question)])
        self._progress(1)
        said = [token for _, given in steps for token in given.get(0, [])]
        first = next(i for i, (_, given) in enumerate(steps) if given.get(0))
        return Answer(
            ttft_ms=1e3 * steps[first][0],
            total_ms=1e3 * steps[-1][0],
            is_right=tasks.is_right(question, self._tokenizer.decode(said)),
            held=max(engine.held()[first + 1 :], default=0.0),
        )

    def _sampling(self, question: Question) -> dict[str, Any]:
        greedy = {"temperature": 0.0, "max_tokens": question.max_tokens}
        if self._max_tokens is None:
            return greedy
        return greedy | {"max_tokens": self._max_tokens, "ignore_eos": True}


def answers(groups: Sequence[Sequence[Question]], turns: int) -> int:
    """Answers of a whole run: a strip and a warm-up before each group's questions."""
    return turns * sum(2 + len(questions) for questions in groups)


def longest(groups: Sequence[Sequence[Question]], max_tokens: int | None) -> int:
    """Tokens of the longest prompt and its answer."""
    return max(
        len(question.token_ids) + (max_tokens or question.max_tokens)
        for questions in groups
        for question in questions
    )


def check_rounds(questions: int, rounds: int) -> None:
    """Raises ConfigError if a round would be left without a question."""
    if questions < rounds:
        raise ConfigError(
            f"There are {questions} questions for {rounds} rounds: expected one or more "
            "per round; lower --rounds or raise --questions."
        )


def row(name: str, rounds: Sequence[Round]) -> Row:
    """A method's row; a ratio above 1 is a first token sooner than dense's."""
    ours, dense = ([a for each in rounds for a in each[k]] for k in (name, "dense"))
    right, dense_right = ([a.is_right for a in some] for some in (ours, dense))
    lost, won = lost_and_won(right, dense_right)
    ttft = operator.attrgetter("ttft_ms")
    return {
        "ttft_ms": results.spread([_mean(ttft, each[name]) for each in rounds]),
        "ratio_to_dense": results.spread([_ratio(ttft, name, each) for each in rounds]),
        "score": statistics.fmean(right),
        "score_dense": statistics.fmean(dense_right),
        "n": len(right),
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar_p(lost, won),
        "kv_pages_ratio": _held_ratio(ours, dense),
    }


def whole_answers(name: str, rounds: Sequence[Round]) -> Row:
    """Time to the last token, where all answers have as many."""
    total = operator.attrgetter("total_ms")
    return {
        "total_ms": results.spread([_mean(total, each[name]) for each in rounds]),
        "total_ratio_to_dense": results.spread([_ratio(total, name, r) for r in rounds]),
    }


def lost_and_won(ours: Sequence[bool], dense: Sequence[bool]) -> tuple[int, int]:
    """Questions that only dense prefill has right, and that only the method has."""
    pairs = list(zip(ours, dense, strict=True))
    return pairs.count((False, True)), pairs.count((True, False))


def mcnemar_p(lost: int, won: int) -> float:
    """How often chance alone parts so many answers so unevenly: the exact test."""
    parted = lost + won
    tail = sum(math.comb(parted, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2.0 * tail * 0.5**parted)


def strip(pages: Mapping[str, Sequence[float]]) -> Strip:
    """A line per span of layers: per page `#` if all of it ran the span, `.` if nothing.

    Digits are tenths of it, rounded up.
    """
    return {span: "".join(map(_mark, shares)) for span, shares in pages.items()}


def _mark(share: float) -> str:
    if share in (0, 1):
        return ".#"[int(share)]
    return str(min(math.ceil(10 * share), 9))


def _ratio(of: _Time, name: str, one_round: Round) -> float:
    """Mean of dense and dense again over a method; dense over dense again."""
    ours, dense = _mean(of, one_round[name]), _mean(of, one_round["dense"])
    if name in ("dense", AGAIN):
        return dense / ours
    return statistics.fmean([dense, _mean(of, one_round[AGAIN])]) / ours


def _mean(of: _Time, answers_of_round: Sequence[Answer]) -> float:
    return statistics.fmean(map(of, answers_of_round))


def _held_ratio(ours: Sequence[Answer], dense: Sequence[Answer]) -> float | None:
    """KV-cache memory held while decoding over dense's; None where it is not known."""
    held, dense_held = (sum(answer.held for answer in some) for some in (ours, dense))
    return held / dense_held if dense_held else None
