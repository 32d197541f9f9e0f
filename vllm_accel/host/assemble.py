"""Switching on: check everything, then name our classes in vLLM's config."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_accel.cerberus import checkpoint
from vllm_accel.config import CerberusConfig, Config, FreeConfig, parse
from vllm_accel.errors import CheckpointError, ConfigError
from vllm_accel.gating.memory import GateMemory
from vllm_accel.gating.policy import Unlearning, make_gate
from vllm_accel.host import carrier, compat, metrics, refuse
from vllm_accel.host.exits import with_exit
from vllm_accel.host.heads import folder_of
from vllm_accel.on_disk import location

logger = logging.getLogger("vllm.vllm_accel")

PROPOSERS = {
    "cerberus": "vllm_accel.host.v1.proposer.CerberusProposer",
    "free": "vllm_accel.host.v1.free_proposer.FreeProposer",
}
SCHEDULER = "vllm_accel.host.v1.scheduler.AccelScheduler"
CPU_WORKER = "vllm_accel.host.v1.cpu_worker.AccelCPUWorker"
GPU_WORKER = "vllm_accel.host.v1.gpu_worker.AccelGPUWorker"


def switch_on(
    engine_args: EngineArgs,
    model_config: Any,
    parallel_config: Any,
    settings: dict[str, Any],
    original: Callable[..., Any],
    *,
    pruned: bool,
) -> Any:
    """vLLM's SpeculativeConfig for our method, and our classes in the other configs.

    In memory the engine sees the official method "custom_class"; our own settings travel
    in `additional_config`.

    Args:
        pruned: by lazyllm, which has named classes that do both.

    Raises:
        AccelError: something is wrong with settings, heads, or what vLLM is asked to do.
    """
    compat.check_version()
    config = parse(settings)
    refuse.unsupported(config.method, engine_args, model_config, parallel_config)
    if isinstance(config, FreeConfig):
        config = with_exit(config, model_config)
    else:
        config = with_heads(config, model_config)
    if pruned:
        config = dataclasses.replace(config, run_ahead=False)  # pages change every step
    else:
        _name_our_classes(engine_args, parallel_config, config.method)
    engine_args.additional_config = carrier.loaded(engine_args.additional_config, config)
    engine_args.async_scheduling = False
    metrics.open_reader()
    _announce(config, pruned=pruned)
    with _as_custom_class(engine_args, config):
        return original(engine_args, model_config, parallel_config)


def _name_our_classes(engine_args: EngineArgs, parallel_config: Any, method: str) -> None:
    worker = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
    parallel_config.worker_cls = _ours_or_derived(
        method, "worker_cls", parallel_config.worker_cls, worker
    )
    engine_args.scheduler_cls = _ours_or_derived(
        method, "scheduler_cls", engine_args.scheduler_cls, SCHEDULER
    )


def with_heads(config: CerberusConfig, model_config: Any) -> CerberusConfig:
    """The config with what its heads decide filled in, after checking them.

    Raises:
        CheckpointError: the heads are missing, broken, or of another model.
        ConfigError: more tokens are asked for than there are heads.
    """
    folder = folder_of(config, model_config)
    heads = checkpoint.load_config(folder)
    _check_shape(folder, heads, model_config)
    count = config.num_speculative_tokens or heads.draft_tokens
    if count > heads.draft_tokens:
        raise ConfigError(
            f"cerberus.num_speculative_tokens={count} is more than the heads have: "
            f"expected 1..{heads.draft_tokens} for {folder}; lower it or leave it out."
        )
    if config.check_base:
        base = location.model_folder(model_config.model, model_config.revision)
        checkpoint.check_against_base(folder, base)
    else:
        checkpoint.load(folder)
    threshold = config.entropy_threshold or heads.entropy_threshold
    _check_gate(config, count, threshold)
    return dataclasses.replace(
        config, num_speculative_tokens=count, entropy_threshold=threshold
    )


def _check_gate(config: CerberusConfig, draft_tokens: int, threshold: float) -> None:
    """Makes the gate once here, so that a bad one ends the start and not a worker."""
    gate = make_gate(config.gate, draft_tokens=draft_tokens, entropy_threshold=threshold)
    if config.gate_state is not None:
        file = Path(config.gate_state)
        if not file.parent.is_dir():
            raise ConfigError(
                f"cerberus.gate_state={config.gate_state!r} is in no folder: expected a "
                "file in a folder that exists; make the folder."
            )
        if isinstance(gate, Unlearning):
            raise ConfigError(
                f"cerberus.gate_state is set and gate={config.gate!r} learns nothing: "
                "expected the gate 'goodput'; leave gate_state out."
            )
        GateMemory(file, writes=False).restore(gate)


def _check_shape(folder: Any, heads: checkpoint.HeadsConfig, model_config: Any) -> None:
    pairs = {
        "hidden_size": (heads.hidden_size, model_config.get_hidden_size()),
        "vocab_size": (heads.vocab_size, model_config.get_vocab_size()),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise CheckpointError(
                f"Heads {folder} have {name}={ours}, the model {model_config.model} has "
                f"{theirs}: expected heads trained on this model; name them with 'model'."
            )


def _ours_or_derived(method: str, name: str, given: Any, ours: str) -> Any:
    if given in (None, "auto", ours):
        return ours
    if not _derives(given, ours):
        raise ConfigError(
            f"{name}={given!r:.80} cannot be used with {method}: expected none or a class "
            f"that derives from {ours}; derive it, or switch {method} off."
        )
    return given


def _derives(given: Any, ours: str) -> bool:
    try:
        cls = resolve_name(given) if isinstance(given, str) else given
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(cls, type) and issubclass(cls, resolve_name(ours))


@contextmanager
def _as_custom_class(engine_args: EngineArgs, config: Config) -> Iterator[None]:
    fields = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    given = {field: getattr(engine_args, field) for field in fields}
    for field in fields:
        setattr(engine_args, field, None)
    engine_args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSERS[config.method],
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    try:
        yield
    finally:
        for field, value in given.items():
            setattr(engine_args, field, value)


def _announce(config: Config, *, pruned: bool) -> None:
    logger.info(
        "%s is on: %s, up to %d drafts a step, gate %s. %s",
        config.method,
        _what_drafts(config),
        config.num_speculative_tokens,
        config.gate,
        "Answers are those of pruned prompts." if pruned else _promise(config),
    )


def _promise(config: Config) -> str:
    if isinstance(config, FreeConfig) and config.mode == "exit":
        return "Answers may differ from plain vLLM's: drafts are final."
    if current_platform.is_cpu():
        return "Greedy tokens are plain vLLM's."
    return (
        "On this device plain vLLM runs Model Runner V2 and this V1: whether it is faster "
        "here has to be measured."
    )


def _what_drafts(config: Config) -> str:
    if isinstance(config, FreeConfig):
        trained = f", exit {config.model}" if config.model else ""
        return f"the first {config.exit_layer} layers{trained}"
    below = f" (below {config.entropy_threshold:.3g} nats)"
    heads = config.model or "beside the model"
    return f"heads {heads}{below if config.gate == 'entropy' else ''}"
