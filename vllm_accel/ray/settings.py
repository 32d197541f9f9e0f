"""What a user says about replicas, checked, and what follows from it for each engine."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_accel import config, preload
from vllm_accel.errors import ConfigError, refuse_unknown_keys
from vllm_accel.serve import with_preloads

ACCELERATORS = ("cpu", "gpu")

REPLICA_CPUS = 0.1
"""CPUs Ray sets aside for a replica's own process on CPU, and for the ingress: both only
pass tokens on."""

_SPARE_CPUS = 0.5
"""What each worker leaves of its cores, so that Ray's own tasks find a place. Without,
two replicas on two cores wait forever for a third."""

_MEMORY_SHARE = 0.7
"""Of the machine's memory, for all workers on CPU together; Ray's processes take 3 GB."""

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
_OWNED = {
    "model": "model",
    "served_model_name": "name",
    "speculative_config": "speculative_config",
    "distributed_executor_backend": "accelerator",
}
"""Engine arguments that have a setting of their own here, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """Engines that are alike, one per replica."""

    model: str
    """Folder or hub id. A folder must be at the same path on every node."""

    replicas: int = 1
    """How many engines."""

    speculative_config: str | Mapping[str, Any] | None = None
    """As in `LLM(speculative_config=...)`: a bare name of ours, or a mapping."""

    lazyllm: Mapping[str, Any] | None = None
    """Settings of LazyLLM, as in `additional_config={"lazyllm": ...}`."""

    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Any other of vLLM's engine arguments, by their names in Python."""

    name: str | None = None
    """What clients call the model. None: the same as `model`."""

    accelerator: str | None = None
    """"cpu" or "gpu". None: what the installed vLLM was built for."""

    threads: int | None = None
    """Cores of each worker on CPU. None: those of this machine, divided."""

    env: Mapping[str, str] = field(default_factory=dict)
    """More environment variables of every engine process."""

    share_gate: bool = False
    """New replicas start from what the gates of the others learnt."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least_one("replicas", self.replicas)
        if self.threads is not None:
            _check_at_least_one("threads", self.threads)
        if self.accelerator is not None and self.accelerator not in ACCELERATORS:
            raise ConfigError(
                f"ray.accelerator={self.accelerator!r} is not known: expected "
                f"{' or '.join(ACCELERATORS)}; leave it out to use what vLLM was built for."
            )
        _check_engine_args(self.engine_args)
        _check_methods(self.speculative_config, self.lazyllm)
        if self.share_gate:
            _check_can_share(self.speculative_config)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "ReplicaSettings":
        """The settings of keyword arguments or a YAML file.

        Raises:
            ConfigError: a key is unknown, missing, or a value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        refuse_unknown_keys(settings, known, "for replicas on Ray")
        if "model" not in settings:
            raise ConfigError(
                "Replicas on Ray have no model: expected a folder or hub id; add 'model'."
            )
        return cls(**settings)

    @property
    def on_cpu(self) -> bool:
        """Whether the engines run on CPU."""
        if self.accelerator is None:
            return preload.is_cpu_build()
        return self.accelerator == "cpu"

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or self.model

    @property
    def model_source(self) -> str:
        """The model for processes that stand in another folder."""
        return absolute(self.model)

    @property
    def workers(self) -> int:
        """Worker processes of one engine."""
        return math.prod(self.engine_args.get(size, 1) for size in _SIZES)

    @property
    def worker_threads(self) -> int:
        """Cores of each worker on CPU."""
        cores = len(os.sched_getaffinity(0))
        return self.threads or max(1, cores // (self.replicas * self.workers))

    @property
    def worker_cpus(self) -> float:
        """CPUs Ray sets aside for each worker on CPU."""
        return max(self.worker_threads - _SPARE_CPUS, _SPARE_CPUS)

    def engine_kwargs(self) -> dict[str, Any]:
        """Arguments of each engine, but for the model. Everything that matters is here."""
        kwargs = dict(self.engine_args)
        if self.speculative_config is not None:
            kwargs["speculative_config"] = _with_absolute_model(self.speculative_config)
        if self.lazyllm is not None:
            more = kwargs.get("additional_config", {})
            kwargs["additional_config"] = {**more, "lazyllm": dict(self.lazyllm)}
        if self.on_cpu and not self._says_memory():
            # vLLM's default is 0.92 of the machine for each worker.
            share = _MEMORY_SHARE / (self.replicas * self.workers)
            kwargs["gpu_memory_utilization"] = round(share, 3)
        return kwargs

    def env_vars(self) -> dict[str, str]:
        """Environment of each engine's processes, on whichever node.

        vLLM's own variables of this process go along; on CPU every engine would bind
        itself to the same first cores, so binding is off and the threads are counted.
        """
        ours = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("VLLM_") or name == "HF_HUB_OFFLINE"
        }
        return {**(self._cpu_env() if self.on_cpu else {}), **ours, **self.env}

    def _cpu_env(self) -> dict[str, str]:
        threads = str(self.worker_threads)
        env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
        preloaded = with_preloads({}).get("LD_PRELOAD")
        return {**env, "LD_PRELOAD": preloaded} if preloaded else env

    def _says_memory(self) -> bool:
        keys = {"kv_cache_memory_bytes", "gpu_memory_utilization"}
        return bool(keys & self.engine_args.keys()) or (
            "VLLM_CPU_KVCACHE_SPACE" in self.env.keys() | os.environ.keys()
        )


def absolute(name: str) -> str:
    """A folder's full path; a hub id stays as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def method_of(speculative_config: str | Mapping[str, Any] | None) -> Any:
    """The name of the speculative method, None where there is none."""
    if isinstance(speculative_config, Mapping):
        return speculative_config.get("method")
    return speculative_config


def _with_absolute_model(given: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(given, str):
        return given
    heads = given.get("model")
    return {**given, "model": absolute(heads)} if isinstance(heads, str) else {**given}


def _check_types(settings: ReplicaSettings) -> None:
    allowed: dict[str, tuple[type, ...]] = {
        "model": (str,),
        "name": (str, type(None)),
        "speculative_config": (str, Mapping, type(None)),
        "lazyllm": (Mapping, type(None)),
        "engine_args": (Mapping,),
        "env": (Mapping,),
        "share_gate": (bool,),
    }
    for key, types in allowed.items():
        value = getattr(settings, key)
        if not isinstance(value, types):
            names = " or ".join(
                "nothing" if kind is type(None) else kind.__name__ for kind in types
            )
            raise ConfigError(
                f"ray.{key}={value!r:.60} is a {type(value).__name__}: expected {names}."
            )


def _check_at_least_one(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"ray.{key}={value!r} is out of range: expected 1 or more.")


def _check_engine_args(engine_args: Mapping[str, Any]) -> None:
    for key, setting in _OWNED.items():
        if key in engine_args:
            raise ConfigError(
                f"ray.engine_args has {key!r}: expected it outside; use {setting!r} of the "
                "replicas instead."
            )
    for size in _SIZES:
        count = engine_args.get(size, 1)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"ray.engine_args has {size}={count!r}: expected a whole number from 1 up; "
                "correct it."
            )


def _check_methods(
    speculative_config: str | Mapping[str, Any] | None, lazyllm: Mapping[str, Any] | None
) -> None:
    """What needs no model to be known wrong; the rest the engine says when it starts."""
    if isinstance(speculative_config, str) or config.is_ours(method_of(speculative_config)):
        config.parse(speculative_config)
    if lazyllm is not None:
        from vllm_accel.lazyllm.config import LazyConfig

        LazyConfig.from_mapping(lazyllm)
    method = method_of(speculative_config)
    if lazyllm is not None and method not in (None, "cerberus"):
        raise ConfigError(
            f"ray.lazyllm is given beside the method {method!r}: expected cerberus, or no "
            "ray.speculative_config; leave one out."
        )


def _check_can_share(speculative_config: str | Mapping[str, Any] | None) -> None:
    given = speculative_config if isinstance(speculative_config, Mapping) else {}
    gate = given.get("gate", "goodput")
    if config.is_ours(method_of(speculative_config)) and gate == "goodput":
        if given.get("gate_state") is None:
            return
        wrong = "speculative_config has a gate_state of its own"
    else:
        wrong = f"speculative_config={speculative_config!r:.80} has no gate that learns"
    raise ConfigError(
        f"ray.share_gate is on and {wrong}: expected one of our methods with the gate "
        "'goodput' and without gate_state; change that or leave share_gate out."
    )
