"""Switching LazyLLM on: check everything, then name our classes in vLLM's config."""

import logging
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache

from vllm_accel.errors import UnsupportedHost
from vllm_accel.host import compat, metrics
from vllm_accel.host.refuse import SPANNED
from vllm_accel.lazyllm.config import LazyConfig
from vllm_accel.lazyllm.schedule import Schedule

logger = logging.getLogger("vllm.vllm_accel")

KEY = "lazyllm"
SCHEDULER = "vllm_accel.host.v1.lazyllm.scheduler.LazyScheduler"
CPU_WORKER = "vllm_accel.host.v1.lazyllm.cpu_worker.LazyCPUWorker"
DRAFTING_SCHEDULER = "vllm_accel.host.v1.lazyllm.scheduler.LazyAccelScheduler"
DRAFTING_CPU_WORKER = "vllm_accel.host.v1.lazyllm.cpu_worker.LazyAccelCPUWorker"

_ANY_BLOCK_SIZE = 32  # spans do not depend on it


def switch_on(
    engine_args: EngineArgs, model_config: Any, parallel_config: Any, method: str | None
) -> None:
    """Checks what is asked for, and puts our classes into the other configs.

    Args:
        method: ours that drafts beside it, if any does.

    Raises:
        AccelError: something is wrong with the settings or what vLLM is asked to do.
    """
    compat.check_version()
    config = LazyConfig.from_mapping(engine_args.additional_config[KEY])
    _refuse_unsupported(engine_args, model_config, parallel_config, config, method)
    num_layers = model_config.get_num_layers(parallel_config)
    schedule = Schedule.of(config, num_layers=num_layers, block_size=_ANY_BLOCK_SIZE)
    parallel_config.worker_cls = CPU_WORKER if method is None else DRAFTING_CPU_WORKER
    engine_args.scheduler_cls = SCHEDULER if method is None else DRAFTING_SCHEDULER
    engine_args.async_scheduling = False
    engine_args.additional_config = {
        **engine_args.additional_config,
        KEY: config.to_dict(),
    }
    if engine_args.max_num_batched_tokens is None:
        engine_args.max_num_batched_tokens = _whole_prompt(config, model_config)
    metrics.open_reader()
    logger.info(
        "lazyllm is on: spans %s of %d layers keep %s of a prompt by %ss, its ends "
        "apart, from %d tokens up, in one piece up to %d. Answers differ from plain's.",
        " ".join(f"[{span.first},{span.stop})" for span in schedule.spans),
        num_layers,
        " ".join(f"{keep:.2g}" for keep in schedule.keep),
        config.granularity,
        config.min_prompt,
        engine_args.max_num_batched_tokens,
    )


def _whole_prompt(config: LazyConfig, model_config: Any) -> int:
    """Tokens of a step: a prompt that fits the model is prefilled in one piece."""
    return int(max(2048, min(config.max_whole_prompt, model_config.max_model_len)))


def _refuse_unsupported(
    engine_args: EngineArgs,
    model_config: Any,
    parallel_config: Any,
    config: LazyConfig,
    method: str | None,
) -> None:
    for asked, found, instead in (
        *_of_models(model_config),
        _of_drafting(engine_args, method),
        *_of_engines(engine_args, parallel_config),
    ):
        if found:
            raise UnsupportedHost(
                f"lazyllm does not work with {asked} yet: expected {instead}; change that "
                "or serve without 'lazyllm' in --additional-config."
            )


_Check = tuple[str, bool, str]
"""(what was asked for, whether it was, what was expected)"""


def _of_models(model_config: Any) -> list[_Check]:
    pooling = model_config.runner_type != "generate"
    mixed = model_config.is_hybrid or model_config.is_attention_free
    sliding = model_config.get_sliding_window() is not None
    text_only = "a text-only, decoder-only model"
    names = model_config.architectures
    return [
        ("pooling models", pooling, "a model that generates text"),
        ("multimodal models", model_config.is_multimodal_model, text_only),
        ("encoder-decoder models", model_config.is_encoder_decoder, text_only),
        ("Mamba and hybrid models", mixed, "full attention in every layer"),
        ("multi-head latent attention", model_config.use_mla, "full attention"),
        ("sliding windows", sliding, "full attention in every layer"),
        ("prompt embeddings", model_config.enable_prompt_embeds, "token ids"),
        ("mixtures of experts", bool(model_config.is_moe), "a dense model"),
        (
            f"models like {', '.join(names)}",
            not SPANNED.intersection(names),
            ", ".join(sorted(SPANNED)),
        ),
    ]


def _of_drafting(engine_args: EngineArgs, method: str | None) -> _Check:
    fields = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    spec = any(getattr(engine_args, field) for field in fields)
    other = spec and method != "cerberus"
    name = method or "vLLM's own speculative decoding"
    return name, other, "cerberus, or no --speculative-config"


def _of_engines(engine_args: EngineArgs, parallel_config: Any) -> list[_Check]:
    context = (
        parallel_config.decode_context_parallel_size > 1
        or parallel_config.prefill_context_parallel_size > 1
    )
    pipeline = parallel_config.pipeline_parallel_size > 1
    quantised = is_quantized_kv_cache(engine_args.kv_cache_dtype)
    launcher = parallel_config.distributed_executor_backend == "external_launcher"
    hybrid = bool(engine_args.disable_hybrid_kv_cache_manager)
    schedulers = (None, SCHEDULER, DRAFTING_SCHEDULER)
    workers = ("auto", CPU_WORKER, DRAFTING_CPU_WORKER)
    own = (
        engine_args.scheduler_cls not in schedulers
        or parallel_config.worker_cls not in workers
    )
    transfer = bool(engine_args.kv_transfer_config or engine_args.kv_offloading_size)
    return [
        ("devices other than CPUs", not current_platform.is_cpu(), "a CPU"),
        ("LoRA (--enable-lora)", bool(engine_args.enable_lora), "no LoRA"),
        ("pipeline parallelism", pipeline, "--pipeline-parallel-size 1"),
        ("context parallelism", context, "neither decode nor prefill context parallel"),
        ("an external launcher", launcher, "--distributed-executor-backend mp"),
        ("a quantised KV cache", quantised, "--kv-cache-dtype auto"),
        ("KV connectors and offloading", transfer, "neither"),
        ("KV events", engine_args.kv_events_config is not None, "no --kv-events-config"),
        ("--disable-hybrid-kv-cache-manager", hybrid, "the hybrid manager, as by default"),
        ("async scheduling", bool(engine_args.async_scheduling), "--no-async-scheduling"),
        ("a scheduler or worker of your own", own, "neither"),
        ("Model Runner V2", bool(envs.VLLM_USE_V2_MODEL_RUNNER), "the variable unset"),
    ]
