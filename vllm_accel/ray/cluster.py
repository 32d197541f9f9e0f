"""A Ray of our own for as long as a command runs, or somebody's cluster."""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_accel.errors import ConfigError, UnsupportedHost
from vllm_accel.ray.settings import REPLICA_CPUS, ReplicaSettings

_REACHABLE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which Ray a command uses."""

    address: str | None = None
    """Of a cluster, "auto" for the one of this machine. None: what `RAY_ADDRESS` says, or
    one of our own."""

    metrics_port: int | None = None
    """Of this node's Ray metrics, when it is our own. None: any."""

    logs: bool = True
    """Whether what the engines log is printed here too."""

    @property
    def cluster(self) -> str | None:
        """The address of somebody's cluster; None: a Ray of our own."""
        return self.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connected(where: Where) -> Iterator[None]:
    """Ray, inside the block.

    Raises:
        UnsupportedHost: nobody answers at the address.
    """
    import ray

    address = where.cluster
    _check_reachable(address)
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=where.logs,
                logging_level=logging.WARNING,
                _metrics_export_port=where.metrics_port,
            )
        else:
            ray.init(
                address=address, log_to_driver=where.logs, logging_level=logging.WARNING
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnsupportedHost(
            f"Ray at {address or 'this machine'} cannot be used ({last_line(error)}): "
            "expected a running cluster; start one with `ray start --head`, or leave "
            "--address out."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself tries for a quarter of an hour before it says so."""
    host, colon, port = (address or "").rpartition(":")
    if not (colon and port.isdigit()) or "://" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACHABLE_S).close()
    except OSError as error:
        raise UnsupportedHost(
            f"Nobody answers at {address} ({error}): expected a running cluster's address; "
            "start one with `ray start --head`, or leave --address out."
        ) from error


def fitted(settings: ReplicaSettings) -> ReplicaSettings:
    """The settings with cores for each worker that these nodes have.

    Raises:
        ConfigError: the cluster is too small; Ray would wait for more in silence.
    """
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if settings.on_cpu and settings.threads is None:
        share = sum(nodes) // (settings.replicas * settings.workers)
        threads = max(1, int(min(share, max(nodes, default=1))))
        settings = dataclasses.replace(settings, threads=threads)
    check_fits(settings, ray.cluster_resources())
    return settings


def check_fits(settings: ReplicaSettings, there: Mapping[str, float]) -> None:
    """Refuses what would wait for resources forever.

    Args:
        settings: of all replicas.
        there: the cluster's resources, as Ray names them.

    Raises:
        ConfigError: the cluster is too small for the replicas.
    """
    kind, needed, instead = demand(settings)
    if there.get(kind, 0) < needed:
        raise ConfigError(
            f"{settings.replicas} replicas need {needed:g} {kind} and Ray has "
            f"{there.get(kind, 0):g}: expected no more than there is; {instead} or add "
            "nodes."
        )


def demand(settings: ReplicaSettings) -> tuple[str, float, str]:
    """The scarce resource, how much all replicas need of it, and what to do about it."""
    workers = settings.replicas * settings.workers
    if not settings.on_cpu:
        return "GPU", workers, "lower --replicas"
    own = (settings.replicas + 1) * REPLICA_CPUS
    needed = workers * settings.worker_cpus + own
    return "CPU", round(needed, 3), "lower --replicas or --threads"


def say(text: str) -> None:
    """One line on stderr, between whatever Ray and vLLM log there."""
    sys.stderr.write(f"vllm-accel: {text}\n")
    sys.stderr.flush()


def last_line(error: BaseException) -> str:
    """What a long message ends with."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(error)
