"""`bench prefill`: time to the first token of several methods, and are they still right?

One request at a time; methods take turns round by round. `dense_again` is the
dense engine asked a second time: what noise alone does to a ratio.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from vllm_accel.bench import results, tasks
from vllm_accel.bench.engine import Engine, Step, Tokenizer
from vllm_accel.bench.results import Row
from vllm_accel.bench.tasks import Question
from vllm_accel.errors import ConfigError

AGAIN = "dense_again"

Answer = tuple[float, bool]
"""Milliseconds to the first token; whether the answer is right."""

Round = dict[str, list[Answer]]


class PrefillBench:
    """One run over engines that are up.

    Args:
        engines: by method, `dense` first.
        tokenizer: the model's.
        rounds: each asks its share of the questions.
        progress: called with the number of answers since its last call.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizer: Tokenizer,
        rounds: int,
        progress: Callable[[int], object],
    ) -> None:
        self._turns = {**engines, AGAIN: engines["dense"]}
        self._tokenizer = tokenizer
        self._rounds = rounds
        self._progress = progress

    def rows(self, groups: Sequence[Sequence[Question]]) -> Iterator[list[Row]]:
        """The rows of one group of questions after the other."""
        for questions in groups:
            self._round(questions[:1])  # not counted
            shares = [questions[n :: self._rounds] for n in range(self._rounds)]
            rounds = [self._round(share) for share in shares]
            length = round(statistics.fmean(len(q.token_ids) for q in questions))
            common = {"prompt_length": length}
            yield [{"method": name} | common | row(name, rounds) for name in self._turns]

    def _round(self, questions: Sequence[Question]) -> Round:
        said: Round = {}
        for name, engine in self._turns.items():
            said[name] = [self._ask(engine, question) for question in questions]
            engine.rest()
        return said

    def _ask(self, engine: Engine, question: Question) -> Answer:
        engine.reset_prefix_cache()
        greedy = {"temperature": 0.0, "max_tokens": question.max_tokens}
        steps = engine.run([question.token_ids], [greedy])
        self._progress(1)
        said = [token for _, given in steps for token in given.get(0, [])]
        right = tasks.is_right(question, self._tokenizer.decode(said))
        return first_token_ms(steps), right


def answers(groups: Sequence[Sequence[Question]], turns: int) -> int:
    """Answers of a whole run, warm-ups included."""
    return turns * sum(1 + len(questions) for questions in groups)


def check_rounds(questions: int, rounds: int) -> None:
    """Raises ConfigError if a round would be left without a question."""
    if questions < rounds:
        raise ConfigError(
            f"There are {questions} questions for {rounds} rounds: expected one or more "
            "per round; lower --rounds or raise --questions."
        )


def first_token_ms(steps: Sequence[Step]) -> float:
    """Milliseconds to the first token of the first request."""
    return 1e3 * next(at for at, given in steps if given.get(0))


def row(name: str, rounds: Sequence[Round]) -> Row:
    """A method's row; a ratio above 1 is a first token sooner than dense's."""
    right = [is_right for each in rounds for _, is_right in each[name]]
    dense = [is_right for each in rounds for _, is_right in each["dense"]]
    return {
        "ttft_ms": results.spread([_ttft_ms(each[name]) for each in rounds]),
        "ratio_to_dense": results.spread([ratio_to_dense(name, each) for each in rounds]),
        "score": statistics.fmean(right),
        "score_dense": statistics.fmean(dense),
        "n": len(right),
        "kv_pages_ratio": 1.0 if name in ("dense", AGAIN) else None,
    }


def ratio_to_dense(name: str, one_round: Round) -> float:
    """Mean of dense and dense again over a method; dense over dense again."""
    ttft, dense = _ttft_ms(one_round[name]), _ttft_ms(one_round["dense"])
    if name in ("dense", AGAIN):
        return dense / ttft
    return statistics.fmean([dense, _ttft_ms(one_round[AGAIN])]) / ttft


def _ttft_ms(answers_of_round: Sequence[Answer]) -> float:
    return statistics.fmean(ttft for ttft, _ in answers_of_round)
