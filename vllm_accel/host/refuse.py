"""What cannot work with our methods yet, refused by name before anything is loaded."""

import re
from importlib.metadata import entry_points
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_accel.errors import UnsupportedHost

SPANNED = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
}
"""Architectures whose layers `host.decoder` knows how to call."""


def unsupported(
    method: str, engine_args: EngineArgs, model_config: Any, parallel_config: Any
) -> None:
    """Refuses the first combination that cannot work.

    Raises:
        UnsupportedHost: with what was asked for and what to do instead.
    """
    checks = _checks(engine_args, model_config, parallel_config)
    if method == "free":
        checks += _checks_of_free(engine_args, model_config, parallel_config)
    for asked, found, instead in checks:
        if found:
            raise UnsupportedHost(
                f"{method} does not work with {asked} yet: expected {instead}; change that "
                "or serve without --speculative-config."
            )


def _checks(
    engine_args: EngineArgs, model_config: Any, parallel_config: Any
) -> list[tuple[str, bool, str]]:
    return [
        ("LoRA (--enable-lora)", bool(engine_args.enable_lora), "no LoRA"),
        (
            "pooling models",
            model_config.runner_type != "generate",
            "a model that generates text",
        ),
        (
            "multimodal models",
            model_config.is_multimodal_model,
            "a text-only model",
        ),
        (
            "encoder-decoder models",
            model_config.is_encoder_decoder,
            "a decoder-only model",
        ),
        (
            "models without full attention (Mamba and hybrids)",
            model_config.is_hybrid or model_config.is_attention_free,
            "an attention-only model",
        ),
        (
            "pipeline parallelism",
            parallel_config.pipeline_parallel_size > 1,
            "--pipeline-parallel-size 1",
        ),
        (
            "an external launcher",
            parallel_config.distributed_executor_backend == "external_launcher",
            "--distributed-executor-backend mp",
        ),
        (
            "a quantised LM head",
            _lm_head_is_quantised(model_config),
            "an LM head in 16 or 32 bits",
        ),
        (
            "async scheduling",
            bool(engine_args.async_scheduling),
            "--no-async-scheduling",
        ),
        (
            "logits processors of its own",
            bool(engine_args.logits_processors) or _has_processor_plugins(),
            "none, because vLLM drops them when it speculates",
        ),
        (
            "KV connectors and offloading",
            bool(engine_args.kv_transfer_config or engine_args.kv_offloading_size),
            "neither --kv-transfer-config nor --kv-offloading-size",
        ),
        (
            "watermarks",
            engine_args.watermark_config is not None,
            "no --watermark-config",
        ),
        (
            "Model Runner V2",
            bool(envs.VLLM_USE_V2_MODEL_RUNNER),
            "VLLM_USE_V2_MODEL_RUNNER unset",
        ),
    ]


def _checks_of_free(
    engine_args: EngineArgs, model_config: Any, parallel_config: Any
) -> list[tuple[str, bool, str]]:
    """What only spans of layers cannot do."""
    names = model_config.architectures
    return [
        (
            f"models like {', '.join(names)}",
            not SPANNED.intersection(names),
            ", ".join(sorted(SPANNED)),
        ),
        (
            "tensor parallelism",
            parallel_config.tensor_parallel_size > 1,
            "--tensor-parallel-size 1",
        ),
        (
            "data parallelism",
            parallel_config.data_parallel_size > 1,
            "--data-parallel-size 1",
        ),
        (
            "transformers' own layers (--model-impl transformers)",
            model_config.using_transformers_backend(),
            "--model-impl vllm",
        ),
        ("mixtures of experts", bool(model_config.is_moe), "a dense model"),
        ("devices other than CPUs", not current_platform.is_cpu(), "a CPU"),
        (
            "context parallelism",
            parallel_config.decode_context_parallel_size > 1,
            "--decode-context-parallel-size 1",
        ),
        (
            "prompt embeddings",
            bool(engine_args.enable_prompt_embeds),
            "no --enable-prompt-embeds",
        ),
    ]


def _names_lm_head(entry: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), "lm_head") is not None
    return entry == "lm_head"


def _has_processor_plugins() -> bool:
    return bool(entry_points(group="vllm.logits_processors"))


def _lm_head_is_quantised(model_config: Any) -> bool:
    """By what the checkpoint's own quantisation config says of `lm_head`."""
    if model_config.quantization is None:
        return False
    if model_config.quantization == "gguf":
        return True
    config = model_config.hf_config.to_dict().get("quantization_config") or {}
    if config.get("quant_method") == "compressed-tensors":
        return not any(_names_lm_head(entry) for entry in config.get("ignore") or [])
    return bool(config.get("lm_head"))
