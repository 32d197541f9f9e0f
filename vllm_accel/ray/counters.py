"""Our counters on the node's Ray metrics port.

The scheduler counts in a file that process 0 reads (`vllm_accel.host.metrics`). Under
Ray that process is the replica's actor, and what it gives to `ray.util.metrics` appears
on its node's port, as `ray_vllm_accel_..._total` with a label `ReplicaId`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import REGISTRY
from prometheus_client.samples import Sample

_PREFIX, _SUFFIX = "vllm:accel_", "_total"


class RayCounter(Protocol):
    """A `ray.util.metrics.Counter`."""

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Adds to the series of these tags."""
        ...


class CounterExport:
    """Hands what was counted since the last time on to Ray.

    Args:
        replica: value of the label `ReplicaId`, as on vLLM's own metrics.
        make: `ray.util.metrics.Counter`.
    """

    def __init__(self, replica: str, make: Callable[..., RayCounter]) -> None:
        self._replica = replica
        self._make = make
        self._counters: dict[str, RayCounter] = {}
        self._given: defaultdict[tuple[Any, ...], float] = defaultdict(float)

    def add(self, samples: Iterable[Sample]) -> None:
        """Adds what samples have gained; counters at 0 stay unknown to Ray."""
        for sample in samples:
            series = (sample.name, *sorted(sample.labels.items()))
            gained = sample.value - self._given[series]
            if gained > 0:
                self._given[series] = sample.value
                tags = {**sample.labels, "ReplicaId": self._replica}
                self._counter(sample.name, tags).inc(gained, tags=tags)

    def _counter(self, name: str, tags: dict[str, str]) -> RayCounter:
        if name not in self._counters:
            self._counters[name] = self._make(
                ray_name(name), description=name, tag_keys=tuple(tags)
            )
        return self._counters[name]


def accel_samples() -> Iterator[Sample]:
    """What this process's engine has counted so far."""
    metrics: Iterable[Any] = REGISTRY.collect()
    for metric in metrics:
        for sample in metric.samples:
            if sample.name.startswith(_PREFIX) and sample.name.endswith(_SUFFIX):
                yield sample


def ray_name(name: str) -> str:
    """What a counter is called in Ray, which adds `ray_` before and `_total` behind."""
    return name.removesuffix(_SUFFIX).replace(":", "_")
