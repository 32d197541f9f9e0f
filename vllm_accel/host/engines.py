"""Engines of `vllm-accel bench`: vLLM's own `LLM`, driven step by step."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm import LLM
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_accel.errors import AccelError
from vllm_accel.host import lazyllm, metrics
from vllm_accel.host.v1.lazyllm import settings as lazy_settings

_RESET_TRIES = 100
_RESET_WAIT_S = 0.01

_SPINS_S = 1.0
"""For so long vLLM's processes look for the next message without pause, before they sleep
(SpinCondition, vllm/distributed/device_communicators/shm_broadcast.py)."""


class Engine:
    """One engine in processes of its own, waiting for batches.

    Args:
        engine_args: of `LLM`; what is not given is as users get it.
    """

    def __init__(self, **engine_args: Any) -> None:
        self._llm = LLM(**engine_args)
        self._engine = self._llm.llm_engine
        self._counters = metrics.newest_folder()
        self._pool = _PoolUse()
        self._held: list[float] = []
        if self._engine.logger_manager is not None:
            self._engine.logger_manager.stat_loggers = [self._pool]

    @property
    def dtype(self) -> str:
        """Of the weights as loaded, such as `bfloat16`."""
        model_config = self._llm.model_config
        return str(model_config.dtype).removeprefix("torch.")

    def run(
        self, prompts: Sequence[list[int]], sampling: Sequence[Mapping[str, Any]]
    ) -> list[tuple[float, dict[int, list[int]]]]:
        """Asks all prompts at once and waits for the end of their answers.

        Args:
            prompts: token ids of each.
            sampling: arguments of SamplingParams for each.

        Returns:
            Per step that gave tokens: seconds since the first prompt was handed over,
            and the new token ids by the place of their prompt.
        """
        asked = [
            (tokens_input(token_ids), _sampling_params(given))
            for token_ids, given in zip(prompts, sampling, strict=True)
        ]
        began = time.perf_counter()
        for place, (prompt, params) in enumerate(asked):
            self._engine.add_request(str(place), prompt, params)
        steps = []
        self._held = []
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            at = time.perf_counter() - began
            given = {int(o.request_id): list(o.outputs[0].token_ids) for o in outputs}
            if any(given.values()):
                steps.append((at, {place: ids for place, ids in given.items() if ids}))
                self._held.append(self._pool.share)
        return steps

    def held(self) -> list[float]:
        """Share of the KV-cache pool in use after each step of the last `run`.

        Zeros unless the engine has `disable_log_stats=False`. What pruning gives back
        shows a step later, as it is taken back when vLLM has counted.
        """
        return self._held

    def pages_ratio(self, num_tokens: int) -> float:
        """Block ids a prompt should hold once prefilled, over those of a dense one."""
        if not self._prunes:
            return 1.0
        return lazy_settings.pages_ratio(self._engine.vllm_config, num_tokens)

    def pages_run(self) -> dict[str, list[float]] | None:
        """By span of layers, the share of each page of the latest prompt pruned that ran.

        None if no prompt was pruned.
        """
        if not self._prunes:
            return None
        pages: dict[str, list[float]] | None = self._llm.collective_rpc("pages_run")[0]
        return pages

    @property
    def _prunes(self) -> bool:
        config = self._engine.vllm_config.additional_config
        return isinstance(config, dict) and lazyllm.KEY in config

    def top2_gap(self, prompt: list[int]) -> float:
        """Difference of the two best next tokens' logprobs after a prompt, in nats."""
        params = _sampling_params({"temperature": 0.0, "max_tokens": 1, "logprobs": 2})
        self._engine.add_request("gap", tokens_input(prompt), params)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        (position,) = outputs[0].outputs[0].logprobs
        best = sorted((token.logprob for token in position.values()), reverse=True)
        return best[0] - best[1]

    def counters(self) -> dict[str, float]:
        """`vllm:accel_*` counters of an engine of ours.

        By name, and `NAME|STATE` where they have a state. Not from `LLM.get_metrics`,
        which cuts seconds to whole ones and knows the newest engine alone.
        """
        totals: Counter[str] = Counter()
        for metric in metrics.read(self._counters):
            for sample in metric.samples:
                state = sample.labels.get("state")
                totals[metric.name + (f"|{state}" if state else "")] += sample.value
        return dict(totals)

    def reset_prefix_cache(self) -> None:
        """Forgets every prompt.

        Raises:
            AccelError: blocks are still in use a second after the last answer.
        """
        for _ in range(_RESET_TRIES):
            if self._engine.reset_prefix_cache():
                return
            time.sleep(_RESET_WAIT_S)
        raise AccelError(
            "The prefix cache could not be reset, as blocks are still in use: expected an "
            "idle engine; run the bench again."
        )

    def rest(self) -> None:
        """Comes back once its processes sleep, and leave the cores to another engine."""
        time.sleep(1.1 * _SPINS_S)

    def close(self) -> None:
        """Ends the engine's processes."""
        self._engine.engine_core.shutdown()


class _PoolUse(AggregateStatLoggerBase):
    """In place of vLLM's loggers: the share of the KV-cache pool that is in use."""

    def __init__(self) -> None:
        self.share = 0.0

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        """See `StatLoggerBase.record`."""
        if scheduler_stats is not None:
            self.share = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def tokenizer(model: str) -> Any:
    """The tokenizer vLLM would use, without an engine."""
    return get_tokenizer(model)


def device_name() -> str:
    """`cpu`, or the accelerator's name."""
    return current_platform.get_device_name()


def _sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """Each step's new tokens alone, so that they can be counted."""
    return SamplingParams(**given, output_kind=RequestOutputKind.DELTA)
