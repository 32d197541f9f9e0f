"""What a response says of how it was made, where its request asks for that.

Of what a scheduler knows, vLLM hands one free mapping on to `RequestOutput` and to the
JSON of a response that is not streamed: `kv_transfer_params`.
"""

from collections.abc import Mapping
from typing import Any

ASKED = "accel_report"
"""`SamplingParams(extra_args={"accel_report": True})`, or 1 in `vllm_xargs`."""
KEY = "vllm_accel"


class MarkingMixin:
    """Overrides of Scheduler (vllm/v1/core/sched/scheduler.py, 0.32).

    Every output of a request that asks says how it was made, not the last alone: a stop
    string is found in the front end, which takes what came with the output at hand.
    """

    def how_made(self, request: Any) -> dict[str, Any]:
        """What there is to say of a request so far."""
        return {}

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        said = self.how_made(request)  # before any book is closed
        given, others = super()._free_request(request, *args, **kwargs)
        return _with_report(given, request, said), others

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """See `Scheduler.update_from_output`."""
        outputs = super().update_from_output(*args, **kwargs)
        for engine_outputs in outputs.values():
            for output in engine_outputs.outputs:
                request = self.requests.get(output.request_id)
                if request is not None:
                    given, said = output.kv_transfer_params, self.how_made(request)
                    output.kv_transfer_params = _with_report(given, request, said)
        return outputs


def _with_report(
    given: dict[str, Any] | None, request: Any, said: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What vLLM or a connector puts there, `said` added if there is any and it is asked."""
    params = request.sampling_params
    if not said or params is None or not (params.extra_args or {}).get(ASKED):
        return given
    return {**(given or {}), KEY: dict(said)}
