"""What a step costs: seconds by rows, requests, prompt tokens and heads, learnt online.

Speculation users complain that it is slower at load: a draft row is nearly free while
weights are streamed for one request and dear once the machine computes. Only measured
time tells where.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError

Floats = NDArray[np.float64]
State = Mapping[str, Any]

_BENDS = np.array([0, 8, 32, 128])  # decode rows where the price of a row may change
_COLUMNS = 13

_FORGET = 0.995
_ANCHOR = 1e-3
_TOLERANCE = 3.0
_FIRST_SCALE = 0.3
_NEVER_ODD = 0.5  # a rare kind of step may be this far off and must be believed
_FIRST = 4
_BATCH = 16
_RIDGE = 1e-6


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
    waited: Any = 0
    """1 if it was scheduled after the end of the one before and not while that one ran; 0
    where there is no choice."""
    shallow_steps: Any = 0
    """Times the first layers were run alone at its end."""
    shallow_rows: Any = 0
    """Rows they were run on."""
    kept_rows: Any = 0
    """Rows of its own that skipped the first layers."""

    def features(self) -> Floats:
        """[steps, features] float64, about 1 where a step is of a usual size."""
        rows = np.asarray(self.decode_rows, dtype=np.float64).reshape(-1, 1)
        columns = np.empty((len(rows), _COLUMNS))
        columns[:, 0] = 1
        columns[:, 1:5] = np.maximum(rows - _BENDS, 0) / 32
        columns[:, 5] = np.asarray(self.requests) / 32
        columns[:, 6] = np.asarray(self.prefill_tokens) / 512
        columns[:, 7] = np.asarray(self.drafted_for) > 0
        columns[:, 8] = np.asarray(self.drafted_for) / 32
        columns[:, 9] = np.asarray(self.waited)
        columns[:, 10] = np.asarray(self.shallow_steps) / 4
        columns[:, 11] = np.asarray(self.shallow_rows) / 32
        columns[:, 12] = np.asarray(self.kept_rows) / 32
        return columns


class StepCost:
    """Seconds of a step, as measured from the end of the one before to its own.

    Recursive least squares on relative errors, old steps forgotten, outliers (a machine
    doing something else for a moment) held down to a few typical errors. What is not
    seen for a while keeps its last price.
    """

    def __init__(self) -> None:
        self._prices: Floats = np.zeros(_COLUMNS)
        self._information: Floats = np.zeros((_COLUMNS, _COLUMNS))
        self._scale = _FIRST_SCALE
        self._waiting: list[tuple[StepShape, float]] = []
        self.steps = 0
        """Steps learnt from."""

    def seconds(self, shape: StepShape) -> Floats:
        """[steps] predicted seconds, above 0; of no use before any step was observed."""
        predicted: Floats = shape.features() @ self._prices
        return np.maximum(predicted, 1e-6)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes one measured step in; a few are learnt from together."""
        self._waiting.append((shape, seconds))
        new = len({(s.requests, s.drafted_for) for s, _ in self._waiting}) > 1
        if len(self._waiting) >= (_FIRST if new else _BATCH) or self.steps < _FIRST:
            self._learn()

    def _learn(self) -> None:
        shapes, seconds = zip(*self._waiting, strict=True)
        self._waiting.clear()
        features = StepShape(*np.array([astuple(s) for s in shapes]).T).features()
        measured = np.array(seconds)
        if self.steps == 0:
            self._prices[0] = measured[0]
        self.steps += len(measured)
        guessed = features @ self._prices
        predicted = np.maximum(guessed, 0.2 * measured)
        errors = (measured - guessed) / predicted
        weights = self._trust(errors)
        rows = features / predicted[:, None]
        self._information *= _FORGET ** len(measured)
        self._information += (rows * weights[:, None]).T @ rows
        anchored = self._information + np.eye(_COLUMNS) * (_ANCHOR / predicted[0] ** 2)
        self._prices += np.linalg.solve(anchored, rows.T @ (weights * errors))

    def _trust(self, errors: Floats) -> Floats:
        """[steps] weights that hold what is far off down to a few typical errors."""
        limit = max(_NEVER_ODD, _TOLERANCE * self._scale)
        size = np.abs(errors)
        self._scale += 0.05 * (float(np.minimum(size, limit).mean()) - self._scale)
        self._scale = max(0.01, self._scale)
        trust: Floats = np.minimum(1.0, limit / np.maximum(size, 1e-12))
        return trust

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
        try:
            prices = np.array(state["prices"], dtype=np.float64)
            information = np.array(state["information"], dtype=np.float64)
            scale, steps = float(state["scale"]), int(state["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"A saved step cost cannot be read ({error!r}): expected what this version "
                "wrote; delete the state file."
            ) from error
        if (prices.shape, information.shape) != ((_COLUMNS,), (_COLUMNS, _COLUMNS)):
            raise ConfigError(
                f"A saved step cost has {prices.shape} prices: expected ({_COLUMNS},); "
                "delete the state file."
            )
        self._prices, self._information = prices, information
        self._scale, self.steps = scale, steps


def merge(states: Sequence[State]) -> State:
    """What replicas learnt, as one state: prices averaged by how much is known of them.

    A price nobody has met keeps the plain mean. As in `calibrators.merge` the
    information is the mean, so that what replicas share does not count again.

    Args:
        states: of `StepCost`, the newest last.

    Raises:
        ConfigError: they have different prices.
    """
    shapes = {np.shape(state["information"]) for state in states}
    if len(shapes) != 1:
        raise ConfigError(
            f"Step costs of shapes {sorted(shapes)} cannot be merged: expected states of "
            "one version; restart the replicas together."
        )
    prices = np.array([state["prices"] for state in states], dtype=np.float64)
    information = np.array([state["information"] for state in states], dtype=np.float64)
    usual, known = prices.mean(axis=0), information.mean(axis=0)
    pulled = np.mean(information @ (prices - usual)[..., None], axis=0)[..., 0]
    ridge = _RIDGE * max(float(np.trace(known)) / len(known), 1e-12)
    moved = np.linalg.solve(known + ridge * np.eye(len(known)), pulled)
    return {
        **states[-1],
        "prices": (usual + moved).tolist(),
        "information": known.tolist(),
        "scale": float(np.mean([state["scale"] for state in states])),
        "steps": max(int(state["steps"]) for state in states),
    }
