"""What a bench needs of an engine and a tokenizer, and what it counts in an answer.

`host/engines.py` has the real engine. The arithmetic is here, so that it is tested
without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TokenIds = list[int]

Step = tuple[float, dict[int, TokenIds]]
"""Seconds since the batch was asked, and the tokens that the step gave to requests, by
their place in the batch."""


class Engine(Protocol):
    """One engine, asked batch by batch."""

    @property
    def dtype(self) -> str:
        """Of the weights as loaded, such as `bfloat16`."""
        ...

    def run(
        self, prompts: Sequence[TokenIds], sampling: Sequence[Mapping[str, Any]]
    ) -> list[Step]:
        """Asks all prompts at once, each with its arguments of `SamplingParams`."""
        ...

    def top2_gap(self, prompt: TokenIds) -> float:
        """Difference of the two best next tokens' logprobs, in nats."""
        ...

    def counters(self) -> dict[str, float]:
        """`vllm:accel_*` counters by name; `NAME|STATE` where they have a state."""
        ...

    def held(self) -> list[float]:
        """Share of the KV-cache pool in use after each step of the last `run`."""
        ...

    def pages_ratio(self, num_tokens: int) -> float:
        """Block ids a prompt should hold once prefilled, over those of a dense one."""
        ...

    def pages_run(self) -> dict[str, list[float]] | None:
        """By span of layers, the share of each page of the latest prompt pruned that ran.

        None if no prompt was pruned.
        """
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets every prompt."""
        ...

    def rest(self) -> None:
        """Comes back once the engine no longer uses the machine."""
        ...


class Tokenizer(Protocol):
    """What of a Hugging Face tokenizer is used."""

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones apart."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that are no text."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch's answers, and what decoding them took; prefill is apart.

    The rate is that of the whole batch: from where each request has its first token to
    where one has its last. Behind that the batch is smaller for a method whose requests
    end at different times than for plain decoding, whose all end together.

    Attributes:
        token_ids: every token of each request, in the order of the batch.
        tokens: those given while every request was decoding.
        seconds: the time these took.
        all_seconds: the time until the last request's end.
        later_tokens: tokens after each request's own first step.
        later_steps: (request, step) pairs that gave them.
    """

    token_ids: list[TokenIds]
    tokens: int
    seconds: float
    all_seconds: float
    later_tokens: int
    later_steps: int

    @classmethod
    def of(cls, steps: Sequence[Step], num_requests: int) -> "Decoded":
        """Counts the steps of one batch; every request got a token."""
        said: list[TokenIds] = [[] for _ in range(num_requests)]
        later_tokens = later_steps = 0
        for _, given in steps:
            for request, token_ids in given.items():
                later_steps += bool(said[request])
                later_tokens += len(token_ids) if said[request] else 0
                said[request] += token_ids
        whole = _while_whole(steps, [len(token_ids) for token_ids in said])
        all_seconds = steps[-1][0] - whole[0][0]
        tokens = sum(len(ids) for _, given in whole[1:] for ids in given.values())
        seconds = whole[-1][0] - whole[0][0]
        return cls(said, tokens, seconds, all_seconds, later_tokens, later_steps)


def _while_whole(steps: Sequence[Step], lengths: Sequence[int]) -> Sequence[Step]:
    """The steps from the one that gives the last first token to the first last one."""
    missing = list(lengths)
    begun = first = 0
    for i, (_, given) in enumerate(steps):
        for request, token_ids in given.items():
            begun += missing[request] == lengths[request]
            missing[request] -= len(token_ids)
        if begun < len(lengths):
            first = i + 1
        elif i > first and any(missing[request] == 0 for request in given):
            return steps[first : i + 1]
    return steps[first:]


def tokens_per_s(batches: Sequence[Decoded]) -> float:
    """Decode rate over several batches asked one after the other."""
    return sum(b.tokens for b in batches) / sum(b.seconds for b in batches)
