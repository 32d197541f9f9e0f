"""What a step costs: seconds by rows, requests, prompt tokens and heads, learnt online.

Speculation users complain that it is slower at load: a draft row is nearly free while
weights are streamed for one request and dear once the machine computes. Only measured
time tells where (papers.md 1.3).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError

Floats = NDArray[np.float64]

BENDS = (8, 32, 128)
"""Decode rows at which the price of a row may change."""

_FORGET = 0.995
_ANCHOR = 1e-3
_TOLERANCE = 3.0
_FIRST_SCALE = 0.3
_HOPELESS = 10.0
_BATCH = 4


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step had to do. Numbers, or arrays of equal length for many steps."""

    decode_rows: Any
    """Rows of requests that decode: one each, and one per draft token."""
    requests: Any
    """Requests that decode."""
    prefill_tokens: Any = 0
    """Rows of requests whose prompt is still being read."""
    drafted_for: Any = 0
    """Requests the heads ran for at its end."""

    def features(self) -> Floats:
        """[steps, features] float64, about 1 where a step is of a usual size."""
        rows = np.atleast_1d(np.asarray(self.decode_rows, dtype=np.float64))
        columns = [
            np.ones_like(rows),
            rows / 32,
            *(np.maximum(rows - bend, 0) / 32 for bend in BENDS),
            np.broadcast_to(np.asarray(self.requests) / 32, rows.shape),
            np.broadcast_to(np.asarray(self.prefill_tokens) / 512, rows.shape),
            np.broadcast_to(np.asarray(self.drafted_for) > 0, rows.shape),
            np.broadcast_to(np.asarray(self.drafted_for) / 32, rows.shape),
        ]
        return np.stack(columns, axis=1)


class StepCost:
    """Seconds of a step, as measured from the start of one to the start of the next.

    Recursive least squares on relative errors, old steps forgotten, outliers (a machine
    doing something else for a moment) held down to a few typical errors. What is not
    seen for a while keeps its last price.
    """

    def __init__(self) -> None:
        size = StepShape(1, 1).features().shape[1]
        self._prices: Floats = np.zeros(size)
        self._information: Floats = np.zeros((size, size))
        self._scale = _FIRST_SCALE
        self._waiting: list[tuple[StepShape, float]] = []
        self.steps = 0
        """Steps learnt from."""

    def seconds(self, shape: StepShape) -> Floats:
        """[steps] predicted seconds, above 0; of no use before any step was observed."""
        predicted: Floats = shape.features() @ self._prices
        return np.maximum(predicted, 1e-6)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes one measured step in; a few are learnt from together.

        What took ten times as long as it should was something else: a pause, a reset.
        """
        if self.steps > _BATCH and seconds > _HOPELESS * float(self.seconds(shape)[0]):
            return
        self._waiting.append((shape, seconds))
        if len(self._waiting) >= _BATCH or self.steps < _BATCH:
            self._learn()

    def _learn(self) -> None:
        shapes, seconds = zip(*self._waiting, strict=True)
        self._waiting.clear()
        features = np.concatenate([shape.features() for shape in shapes])
        measured = np.array(seconds)
        if self.steps == 0:
            self._prices[0] = measured[0]
        self.steps += len(measured)
        predicted = np.maximum(features @ self._prices, 0.2 * measured)
        errors = (measured - features @ self._prices) / predicted
        limit = _TOLERANCE * self._scale
        weights = np.minimum(1.0, limit / np.maximum(np.abs(errors), 1e-12))
        typical = float(np.minimum(np.abs(errors), limit).mean())
        self._scale = max(0.01, 0.95 * self._scale + 0.05 * typical)
        rows = features / predicted[:, None]
        self._information *= _FORGET ** len(measured)
        self._information += (rows * weights[:, None]).T @ rows
        anchored = (
            self._information + _ANCHOR * np.eye(len(self._prices)) / measured[0] ** 2
        )
        self._prices += np.linalg.solve(anchored, rows.T @ (weights * errors))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; `load_state_dict` makes another one alike."""
        return {
            "prices": self._prices.tolist(),
            "information": self._information.tolist(),
            "scale": self._scale,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what another one learnt.

        Raises:
            ConfigError: it is not a state of this version.
        """
        size = len(self._prices)
        try:
            prices = np.array(state["prices"], dtype=np.float64)
            information = np.array(state["information"], dtype=np.float64)
            scale, steps = float(state["scale"]), int(state["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"A saved step cost cannot be read ({error!r}): expected what this version "
                "wrote; delete the state file."
            ) from error
        if prices.shape != (size,) or information.shape != (size, size):
            raise ConfigError(
                f"A saved step cost has {prices.shape} prices: expected ({size},); delete "
                "the state file."
            )
        self._prices, self._information = prices, information
        self._scale, self.steps = scale, steps
