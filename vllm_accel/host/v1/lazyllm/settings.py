"""What scheduler and workers both work out of the config, each for itself."""

import logging
import math
from typing import Any

from vllm_accel.errors import ConfigError
from vllm_accel.host.v1.lazyllm.aux_store import rows_per_page
from vllm_accel.lazyllm.config import Keep, LazyConfig, requested_keep
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import num_pages
from vllm_accel.spans import group_size

logger = logging.getLogger("vllm.vllm_accel")

KEY = "lazyllm"
"""In `additional_config`."""

EVERYTHING = 1.0


def of(vllm_config: Any) -> LazyConfig:
    """The settings of an engine."""
    return LazyConfig.from_mapping(vllm_config.additional_config[KEY])


def schedule(vllm_config: Any) -> Schedule:
    """Spans of the engine's model and what they keep, for its size of pages."""
    return Schedule.of(
        of(vllm_config),
        num_layers=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        block_size=vllm_config.cache_config.block_size,
    )


def aux_blocks(vllm_config: Any, spec: Any, num_tokens: int) -> int:
    """Blocks that hold the hidden states of so many parked tokens.

    Args:
        spec: of any layer's KV cache.
    """
    if not of(vllm_config).revives:
        return 0
    model_config = vllm_config.model_config
    page = spec.page_size_bytes // model_config.dtype.itemsize
    rows = rows_per_page(page, model_config.get_hidden_size())
    return num_pages(num_tokens, rows * group_size(schedule(vllm_config).spans))


def pages_ratio(vllm_config: Any, num_tokens: int) -> float:
    """Block ids that a prefilled prompt holds, Aux Cache included, over a dense one's.

    The formula; both in pages of the engine's size.
    """
    plan = schedule(vllm_config)
    if not plan.prunes(num_tokens):
        return 1.0
    model_config, block_size = vllm_config.model_config, vllm_config.cache_config.block_size
    heads = model_config.get_num_kv_heads(vllm_config.parallel_config)
    page = 2 * heads * model_config.get_head_size() * block_size
    rows = rows_per_page(page, model_config.get_hidden_size()) * group_size(plan.spans)
    return plan.pages_ratio(num_tokens, rows if of(vllm_config).revives else math.inf)


def wanted_keep(sampling_params: Any, engine_schedule: Schedule) -> Keep | None:
    """What a request asks for; None if it leaves that to the engine.

    Log probabilities of a prompt need all of it in every layer.
    """
    if sampling_params is None or sampling_params.prompt_logprobs is not None:
        return EVERYTHING
    try:
        return requested_keep(sampling_params.extra_args, len(engine_schedule.spans) - 1)
    except ConfigError as error:
        logger.warning("%s The request runs dense.", error)
        return EVERYTHING
