"""What a response says of how it was made, where its request asks for that.

Of what a scheduler knows, vLLM hands one free mapping on to `RequestOutput` and to the
JSON of a response that is not streamed: `kv_transfer_params`.
"""

from collections.abc import Mapping
from typing import Any

ASKED = "accel_report"
"""`SamplingParams(extra_args={"accel_report": True})`, or 1 in `vllm_xargs`."""
KEY = "vllm_accel"


def with_report(
    given: dict[str, Any] | None, request: Any, report: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a request's response carries, `report` added under `KEY` if it asks.

    Args:
        given: what vLLM or another of our methods puts there.
    """
    params = request.sampling_params
    if params is None or not (params.extra_args or {}).get(ASKED):
        return given
    others = given or {}
    return {**others, KEY: {**others.get(KEY, {}), **report}}
