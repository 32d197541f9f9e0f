"""`vllm-accel ray serve`: the app, up until a signal."""

import re
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_accel.errors import AccelError
from vllm_accel.ray import app, cluster
from vllm_accel.ray.cluster import Where
from vllm_accel.ray.settings import ReplicaSettings

APP = "vllm_accel"
"""The app's name on the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where clients ask."""

    host: str
    port: int


def serve_until_stopped(
    settings: ReplicaSettings, where: Where, endpoint: Endpoint
) -> None:
    """Serves until SIGINT or SIGTERM, then takes down what it put up.

    Raises:
        AccelError: the replicas do not fit, or do not start.
    """
    with cluster.connected(where):
        settings = cluster.fitted(settings)
        from ray import serve

        _listen(endpoint)
        try:
            _run(app.built(settings))
            cluster.say(
                f"{settings.replicas} replicas of {settings.served_name} at "
                f"http://{endpoint.host}:{endpoint.port}/v1"
            )
            _wait_for_signal()
        finally:
            if where.cluster is None:
                serve.shutdown()
            else:  # other apps may run there
                serve.delete(APP)


def _listen(endpoint: Endpoint) -> None:
    from ray import serve

    http_options = {"host": endpoint.host, "port": endpoint.port}
    try:
        serve.start(http_options=http_options)
    except RuntimeError as error:
        raise AccelError(
            f"Ray Serve cannot listen at {endpoint.host}:{endpoint.port} "
            f"({cluster.last_line(error)}): expected a port that nobody uses; take another "
            "one with --port."
        ) from error


def _run(application: Any) -> None:
    from ray import serve

    try:
        serve.run(application, name=APP, route_prefix="/", blocking=False)
    except RuntimeError as error:
        reports = [str(error), *_reports(serve.status())]
        raise AccelError(
            f"The replicas did not start ({reason(reports)}): expected a model, heads "
            "and engine arguments that vLLM can serve; correct them, or try the same with "
            "`vllm-accel serve` to see all it says."
        ) from error


def _reports(status: Any) -> list[str]:
    """What Serve says of each part; its own exception may name the part alone."""
    app = status.applications.get(APP)
    return [part.message for part in app.deployments.values()] if app else []


def reason(reports: Iterable[str]) -> str:
    """The line of Serve's reports that says what went wrong."""
    text = "\n".join(reports)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or lines or ["no reason given"])[-1]


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
