"""The Serve app: replicas of one model behind an OpenAI endpoint.

Ray Serve LLM does the work. Ours are a server that ends when its engine is dead, an
ingress that asks again, and defaults under which replicas on CPU do not share a core.
"""

from collections.abc import Mapping
from typing import Any

from vllm_accel.errors import ConfigError
from vllm_accel.ray import extra
from vllm_accel.ray.settings import REPLICA_CPUS, ReplicaSettings

SERVER = "vllm_accel.ray.server:FastFailServer"
INGRESS = "vllm_accel.ray.ingress:RetryingIngress"

SHARE_GATE = "vllm_accel_share_gate"
"""Key in Ray's `experimental_configs`, which reach every replica."""

_HEALTH_CHECK_S = 2
"""Between Ray's looks at a replica, by which it learns that one must be replaced."""

_FAILED_STARTS = 2
"""Starts that may fail before the app is given up, as long as none has succeeded."""


def build_app(model: str, replicas: int = 1, **settings: Any) -> Any:
    """A Ray Serve application, for `ray.serve.run`.

    >>> serve.run(build_app(MODEL, 2, speculative_config="cerberus"))   # doctest: +SKIP

    Args:
        model: folder or hub id.
        replicas: engines, each with all of the model.
        settings: the other fields of `ReplicaSettings`.

    Raises:
        AccelError: a setting is wrong, or the ray extra is not installed.
    """
    return built(
        ReplicaSettings.from_mapping({"model": model, "replicas": replicas, **settings})
    )


def serve_app(args: dict[str, Any]) -> Any:
    """`build_app` for the `import_path` of a YAML file; `args` are its arguments."""
    return built(ReplicaSettings.from_mapping(args))


def built(settings: ReplicaSettings) -> Any:
    """The application of checked settings.

    Raises:
        AccelError: vLLM or Ray know no such engine argument, or the extra is missing.
    """
    extra.require()
    from ray.serve.llm import build_openai_app

    try:
        return build_openai_app(serving_args(settings))
    except ValueError as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"Ray Serve LLM refuses these replicas ({said[-1] if said else error!r}): "
            "expected vLLM's engine arguments by their names in Python; correct "
            "engine_args."
        ) from error


def serving_args(settings: ReplicaSettings) -> dict[str, Any]:
    """What `ray.serve.llm.build_openai_app` takes; plain JSON values."""
    return {
        "llm_configs": [_llm_config(settings)],
        "ingress_cls_config": {"ingress_cls": INGRESS},
        "ingress_deployment_config": {"num_replicas": 1, **_small_actor(settings)},
    }


def _llm_config(settings: ReplicaSettings) -> dict[str, Any]:
    kind = "cpu" if settings.on_cpu else "gpu"
    bundle = {"bundle_per_worker": {"CPU": settings.worker_cpus}}
    return {
        "model_loading_config": {
            "model_id": settings.served_name,
            "model_source": settings.model_source,
        },
        "accelerator_config": {"kind": kind},
        "placement_group_config": bundle if settings.on_cpu else None,
        "engine_kwargs": settings.engine_kwargs(),
        "runtime_env": {"env_vars": settings.env_vars()},
        "deployment_config": {
            "num_replicas": settings.replicas,
            "health_check_period_s": _HEALTH_CHECK_S,
            "max_constructor_retry_count": _FAILED_STARTS,
            **_small_actor(settings),
        },
        "server_cls": SERVER,
        "experimental_configs": {SHARE_GATE: settings.share_gate},
    }


def _small_actor(settings: ReplicaSettings) -> Mapping[str, Any]:
    if not settings.on_cpu:
        return {}  # where the work is on GPUs, a CPU each is there to be had
    return {"ray_actor_options": {"num_cpus": REPLICA_CPUS}}
