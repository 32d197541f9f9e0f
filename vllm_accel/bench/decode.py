"""`bench decode`: tokens per second of several methods that take turns.

Every engine is up at once and they take turns round by round, so that a machine whose
speed drifts slows all alike. `plain_again` is plain vLLM asked a second time in each
round: what noise alone does to a ratio.
"""

import logging
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_accel.bench import compare, results
from vllm_accel.bench.engine import Decoded, Engine, tokens_per_s
from vllm_accel.bench.methods import COUNTED, INEXACT
from vllm_accel.bench.prompts import Prompt, batches, rotated
from vllm_accel.bench.results import Row
from vllm_accel.errors import ConfigError
from vllm_accel.looping import WINDOW, loops

logger = logging.getLogger("vllm_accel.bench")

PROMPT_SETS = ("not_looping", "all")
LEAST_PROMPTS = 12
AGAIN = "plain_again"

Round = dict[str, list[Decoded]]
"""What each method said in a round, batch by batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """What is measured.

    Attributes:
        batch_sizes: requests asked at once.
        prompt_sets: of `PROMPT_SETS`; each has rows of its own.
        rounds: each gives one rate per method.
        max_tokens: of every answer, 2 or more; none ends sooner.
        temperature: above 0 tokens are not compared.
        num_prompts: per round; None is the batch size, at least 12.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prompt_sets: tuple[str, ...] = PROMPT_SETS
    rounds: int = 5
    max_tokens: int = 128
    temperature: float = 0.0
    num_prompts: int | None = None

    def prompts_per_round(self, batch_size: int) -> int:
        """As asked, rounded up to whole batches."""
        asked = self.num_prompts or max(batch_size, LEAST_PROMPTS)
        return -(-asked // batch_size) * batch_size

    def most_prompts(self) -> int:
        """Prompts after which the first comes again, at the greediest batch size."""
        return self.rounds * max(map(self.prompts_per_round, self.batch_sizes))

    def answers(self, prompts: int, turns: int) -> int:
        """Answers of a whole run, the look for loops and warm-ups included."""
        timed = sum(map(self.prompts_per_round, self.batch_sizes)) * self.rounds
        warm_up = sum(self.batch_sizes)
        return prompts + turns * (timed * len(self.prompt_sets) + warm_up)


class DecodeBench:
    """One run over engines that are up.

    Args:
        engines: by method, `plain` first.
        plan: what is measured.
        progress: called with the number of answers since its last call.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        plan: DecodePlan,
        progress: Callable[[int], object],
    ) -> None:
        self._plain = engines["plain"]
        # Plain at both ends of a round: steady drift leaves the mean of the two alone.
        self._turns = {**engines, AGAIN: self._plain}
        self._plan = plan
        self._progress = progress
        limit = compare.tie_below(self._plain.dtype)
        self._judge = compare.Judge(self._plain.top2_gap, limit)
        self.differences: list[tuple[str, int, compare.Difference]] = []
        """(method, batch size, where an answer is not plain's)."""

    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        """The rows of one batch size after the other.

        Raises:
            ConfigError: every prompt loops, and only prompts that do not are asked for.
        """
        looping = self._looping(prompts)
        sets = self._sets(prompts, looping)
        for batch_size in self._plan.batch_sizes:
            first = next(iter(sets.values()))
            self._round(batches(rotated(first, 0, batch_size), batch_size))
            rows = [
                self._rows(name, chosen, batch_size, looping)
                for name, chosen in sets.items()
            ]
            yield [row for of_a_set in rows for row in of_a_set]

    def _looping(self, prompts: Sequence[Prompt]) -> set[str]:
        """Names of prompts whose plain greedy answer goes round in circles."""
        if self._plan.max_tokens < WINDOW:
            logger.warning(
                "Answers of %d tokens are too short to tell loops (expected %d or more): "
                "every prompt counts as not looping.",
                self._plan.max_tokens,
                WINDOW,
            )
        greedy = {"temperature": 0.0, "max_tokens": self._plan.max_tokens}
        found: set[str] = set()
        for batch in batches(prompts, max(self._plan.batch_sizes)):
            said = self._ask(self._plain, batch, [greedy] * len(batch)).token_ids
            found |= {p.name for p, ids in zip(batch, said, strict=True) if loops(ids)}
        self._plain.rest()
        return found

    def _sets(
        self, prompts: Sequence[Prompt], looping: set[str]
    ) -> dict[str, Sequence[Prompt]]:
        calm = [prompt for prompt in prompts if prompt.name not in looping]
        by_name = {"not_looping": calm, "all": prompts}
        sets = {name: by_name[name] for name in self._plan.prompt_sets if by_name[name]}
        if not sets:
            raise ConfigError(
                f"The model's answers to all {len(prompts)} prompts loop: expected some "
                "that do not; use other prompts, or --prompt-sets all."
            )
        if len(sets) < len(self._plan.prompt_sets):
            logger.warning("The model's answers to all prompts loop: no rows without.")
        return sets

    def _ask(
        self, engine: Engine, batch: Sequence[Prompt], sampling: Sequence[dict[str, Any]]
    ) -> Decoded:
        engine.reset_prefix_cache()
        to_the_end = [{**each, "ignore_eos": True} for each in sampling]
        steps = engine.run([prompt.token_ids for prompt in batch], to_the_end)
        self._progress(len(batch))
        return Decoded.of(steps, len(batch))

    def _round(self, round_batches: Sequence[list[Prompt]]) -> Round:
        """Asks every method all batches, one method after the other."""
        said: Round = {}
        for name, engine in self._turns.items():
            said[name] = [
                self._ask(engine, batch, [self._sampling()] * len(batch))
                for batch in round_batches
            ]
            engine.rest()
        return said

    def _sampling(self) -> dict[str, Any]:
        # Without seeds: vLLM 0.32 on CPU dies of a seeded request whose prompt is chunked.
        plan = self._plan
        return {"temperature": plan.temperature, "max_tokens": plan.max_tokens}

    def _rows(
        self,
        prompt_set: str,
        prompts: Sequence[Prompt],
        batch_size: int,
        looping: set[str],
    ) -> list[Row]:
        count = self._plan.prompts_per_round(batch_size)
        starts = [n * count for n in range(self._plan.rounds)]
        asked = [rotated(prompts, start, count) for start in starts]
        before = self._counters()
        rounds = [self._round(batches(chosen, batch_size)) for chosen in asked]
        after = self._counters()
        used = [prompt for chosen in asked for prompt in chosen]
        share = statistics.fmean(prompt.name in looping for prompt in used)
        common = {"batch_size": batch_size, "prompts": prompt_set}
        return [
            {"method": name}
            | common
            | speeds(name, rounds)
            | counted(
                before.get(name, {}), after.get(name, {}), decode_seconds(name, rounds)
            )
            | {"looping_share": share}
            | self._comparison(name, batch_size, used, rounds)
            for name in self._turns
        ]

    def _counters(self) -> dict[str, dict[str, float]]:
        ours = COUNTED & self._turns.keys()
        return {name: self._turns[name].counters() for name in ours}

    def _comparison(
        self, name: str, batch_size: int, used: Sequence[Prompt], rounds: Sequence[Round]
    ) -> Row:
        """Counts of equal, tied and different answers; nothing above temperature 0.

        A method that may say something else has equal ones alone.
        """
        if self._plan.temperature > 0:
            return dict.fromkeys(("identical_tokens", "ties", "differences"))
        matches = compare.Matches()
        said, plainly = _answers(name, rounds), _answers("plain", rounds)
        if name in INEXACT:
            same = sum(map(operator.eq, said, plainly))
            return {"identical_tokens": same, "ties": None, "differences": None}
        for prompt, ours, plain in zip(used, said, plainly, strict=True):
            self._judge.add(matches, prompt, ours, plain)
        self.differences += [(name, batch_size, one) for one in matches.differences]
        return {
            "identical_tokens": matches.identical,
            "ties": matches.ties,
            "differences": len(matches.differences),
        }


def speeds(name: str, rounds: Sequence[Round]) -> Row:
    """Tokens per second, ratio to plain of the same round, tokens per step."""
    said = [decoded for each in rounds for decoded in each[name]]
    steps = sum(decoded.later_steps for decoded in said)
    return {
        "tokens_per_s": results.spread([tokens_per_s(each[name]) for each in rounds]),
        "ratio_to_plain": results.spread([ratio_to_plain(name, each) for each in rounds]),
        "tokens_per_step": sum(decoded.later_tokens for decoded in said) / steps,
    }


def ratio_to_plain(name: str, one_round: Round) -> float:
    """A method over the mean of plain and plain again; plain again over plain."""
    rate, plain = tokens_per_s(one_round[name]), tokens_per_s(one_round["plain"])
    if name in ("plain", AGAIN):
        return rate / plain
    return rate / statistics.fmean([plain, tokens_per_s(one_round[AGAIN])])


def decode_seconds(name: str, rounds: Sequence[Round]) -> float:
    """Time a method spent decoding in all rounds, to the end of every answer."""
    return sum(decoded.all_seconds for each in rounds for decoded in each[name])


def counted(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> Row:
    """What counters that grew in between say; None where nothing was counted.

    Args:
        before: counters before the rounds.
        after: those after.
        seconds: decode time in between.
    """
    grown: dict[str, float] = defaultdict(float)
    for name, value in after.items():
        grown[name.removeprefix("vllm:accel_")] = value - before.get(name, 0.0)
    is_open = grown["gate_decisions|open"]
    wrong = grown["final_tokens"] - grown["final_agreed_tokens"]
    tokens = grown["output_tokens"]
    return {
        "gate_open_share": _over(is_open, is_open + grown["gate_decisions|closed"]),
        "draft_cost_share": grown["draft_seconds"] / seconds if after else None,
        "layers_per_token": _over(grown["layer_rows"], tokens),
        "agreement": _over(tokens - wrong, tokens) if grown["final_tokens"] else None,
    }


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _answers(name: str, rounds: Sequence[Round]) -> list[list[int]]:
    """Every answer of a method, in the order it was asked."""
    batch_answers = [decoded for each in rounds for decoded in each[name]]
    return [token_ids for decoded in batch_answers for token_ids in decoded.token_ids]
