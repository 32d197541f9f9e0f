"""What a step costs: seconds by rows, requests, prompt tokens and heads, learnt online.

Speculation users complain that it is slower at load: a draft row is nearly free while
weights are streamed for one request and dear once the machine computes. Only measured
time tells where.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError

Floats = NDArray[np.float64]
State = Mapping[str, Any]
Kind = tuple[int, ...]

_BENDS = np.array([0, 8, 32, 128])  # decode rows where the price of a row may change
_COLUMNS = 12

_KEPT = 16
"""Steps of each kind that are remembered."""
_HALF_LIFE, _OLD = 256, 0.05
"""Steps after which one counts half, and what the oldest still counts."""
_NEXT_LOAD = 0.1
"""What steps at half or twice as many requests count beside those at a load itself."""
_TYPICAL = 0.15
"""Relative error from which on a step is held down."""
_REFITS = 3
_FIRST, _BATCH = 4, 16
_SURPRISE, _SURPRISED = 0.2, 4
"""Relative error of a step that counts as several towards the next fit."""
_ANCHOR = np.array([1e-7] + [1e-5] * (_COLUMNS - 1))
"""Pull towards 0, for what steps do not tell apart: the constant's goes last."""


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
    shallow_steps: Any = 0
    """Times the first layers were run alone at its end."""
    shallow_rows: Any = 0
    """Rows they were run on."""
    kept_rows: Any = 0
    """Rows of its own that skipped the first layers."""

    def load(self) -> NDArray[np.int64]:
        """[steps] binary digits of the number of requests."""
        digits: NDArray[np.int64] = np.frexp(np.asarray(self.requests).reshape(-1))[1]
        return digits

    def kind(self) -> Kind:
        """Of one step: steps of a kind cost about the same."""
        drafts = int(self.decode_rows) - int(self.requests)
        sizes = (self.requests, drafts, self.prefill_tokens, self.shallow_rows)
        digits = (int(size).bit_length() for size in sizes)
        return (*digits, bool(self.drafted_for), bool(self.kept_rows))

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
        columns[:, 9] = np.asarray(self.shallow_steps) / 4
        columns[:, 10] = np.asarray(self.shallow_rows) / 32
        columns[:, 11] = np.asarray(self.kept_rows) / 32
        return columns


class _Remembered:
    """The last steps of every kind, in arrays that least squares can take."""

    def __init__(self) -> None:
        self.shapes: list[StepShape] = []
        self._places: dict[Kind, list[int]] = {}
        self._features: Floats = np.zeros((0, _COLUMNS))
        self._seconds: Floats = np.zeros(0)
        self._loads: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._when: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def put(self, shape: StepShape, seconds: float, when: int) -> int:
        """Takes in the step number `when`; how many of its kind are remembered."""
        places = self._places.setdefault(shape.kind(), [])
        place = self._place_in(places)
        self.shapes[place : place + 1] = [shape]
        self._features[place] = shape.features()[0]
        self._seconds[place] = seconds
        self._loads[place] = shape.load()[0]
        self._when[place] = when
        return len(places)

    def _place_in(self, places: list[int]) -> int:
        """Where the next step of a kind goes: a place of its own, or its oldest's."""
        if len(places) == _KEPT:
            places.append(places.pop(0))
            return places[-1]
        used = len(self.shapes)
        if used == len(self._seconds):
            self._grow(max(64, used))
        places.append(used)
        return used

    def _grow(self, more: int) -> None:
        self._features = np.concatenate([self._features, np.zeros((more, _COLUMNS))])
        self._seconds = np.concatenate([self._seconds, np.zeros(more)])
        none = np.zeros(more, dtype=np.int64)
        self._loads = np.concatenate([self._loads, none])
        self._when = np.concatenate([self._when, none])

    def relative(self) -> Floats:
        """[steps, features] over the seconds measured."""
        used = len(self.shapes)
        relative: Floats = self._features[:used] / self._seconds[:used, None]
        return relative

    def weights(self, load: int, now: int) -> Floats:
        """[steps] what each counts at a load, above 0."""
        used = len(self.shapes)
        lately = np.maximum(0.5 ** ((now - self._when[:used]) / _HALF_LIFE), _OLD)
        weights: Floats = lately * _NEXT_LOAD ** np.abs(self._loads[:used] - load)
        return weights

    def in_order(self) -> Iterator[tuple[StepShape, float, int]]:
        """Every step, its seconds and its number, the oldest first."""
        for place in np.argsort(self._when[: len(self.shapes)], kind="stable").tolist():
            yield self.shapes[place], float(self._seconds[place]), int(self._when[place])


class StepCost:
    """Seconds of a step, as measured from the end of the one before to its own.

    The last steps of every kind are remembered: what is done all the time must not push
    out what is done now and then, as a decision is between the two. Prices are fitted to
    them by least squares on relative errors, apart for every load, where steps at other
    loads count less. Outliers (a machine doing something else for a moment) are held
    down.
    """

    def __init__(self) -> None:
        self._seen = _Remembered()
        self._waiting: list[tuple[StepShape, float]] = []
        self._prices: dict[int, Floats] = {}
        self._unfitted = 0
        self._steps = 0

    def seconds(self, shape: StepShape) -> Floats:
        """[steps] predicted seconds, above 0; of no use before any step was observed."""
        self._take_in()
        features = shape.features()
        if not self._seen.shapes:
            return np.full(len(features), 1e-6)
        loads = shape.load()
        if len(loads) == 1:  # of all steps: a gate asks several times in a step
            predicted = features @ self._prices_at(int(loads[0]))
        else:
            predicted = self._at_their_loads(features, loads)
        return np.maximum(predicted, 1e-6)

    def _at_their_loads(self, features: Floats, loads: NDArray[np.int64]) -> Floats:
        predicted = np.zeros(len(features))
        for load in set(loads.tolist()):
            here = loads == load
            predicted[here] = features[here] @ self._prices_at(load)
        return predicted

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes one measured step in; prices follow after a few, at once if it is new."""
        self._waiting.append((shape, seconds))
        if len(self._waiting) >= _BATCH:
            self._take_in()

    def _take_in(self) -> None:
        """Not in `observe`, step by step: a closed gate is to cost next to nothing."""
        for shape, seconds in self._waiting:
            alike = self._seen.put(shape, seconds, self._steps)
            self._steps += 1
            self._unfitted += _SURPRISED if self._surprises(shape, seconds) else 1
            if self._unfitted >= _BATCH or alike < _FIRST:
                self._prices.clear()
                self._unfitted = 0
        self._waiting.clear()

    def _surprises(self, shape: StepShape, seconds: float) -> bool:
        """Whether the prices in use, if any, were far off."""
        prices = self._prices.get(int(shape.load()[0]))
        if prices is None:
            return False
        predicted = float(shape.features()[0] @ prices)
        return abs(predicted / seconds - 1) > _SURPRISE

    def _prices_at(self, load: int) -> Floats:
        """[features] seconds of each, at a load."""
        if load not in self._prices:
            self._prices[load] = self._fitted(load)
        return self._prices[load]

    def _fitted(self, load: int) -> Floats:
        rows, weights = self._seen.relative(), self._seen.weights(load, self._steps)
        prices = _least_squares(rows, weights)
        for _ in range(_REFITS):
            error = np.maximum(np.abs(rows @ prices - 1), _TYPICAL)
            prices = _least_squares(rows, weights * (_TYPICAL / error))
        return prices

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; `load_state_dict` makes another one alike."""
        self._take_in()
        seen = [
            [*map(float, astuple(shape)), seconds, when - self._steps]
            for shape, seconds, when in self._seen.in_order()
        ]
        return {"seen_steps": seen}

    def load_state_dict(self, state: State) -> None:
        """Takes over what another one learnt.

        Raises:
            ConfigError: it is not a state of this version.
        """
        seen = _Remembered()
        try:
            for *shape, seconds, when in state["seen_steps"]:
                seen.put(StepShape(*shape), float(seconds), int(when))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"A saved step cost cannot be read ({error!r}): expected what this version "
                "wrote; delete the state file."
            ) from error
        self._seen, self._steps = seen, 0
        self._waiting.clear()
        self._prices.clear()


def _least_squares(rows: Floats, weights: Floats) -> Floats:
    """[features] prices with which rows [steps, features] come closest to 1."""
    weighted = rows * weights[:, None]
    information = weighted.T @ rows
    information[np.diag_indices(_COLUMNS)] += _ANCHOR * float(information[0, 0])
    prices: Floats = np.linalg.solve(information, weighted.sum(axis=0))
    return prices


def merge(states: Sequence[State]) -> State:
    """What replicas learnt, as one state: of what they have in common, the newest steps.

    Args:
        states: of `StepCost`.
    """
    steps = [step for state in states for step in state["seen_steps"]]
    return {"seen_steps": sorted(steps, key=lambda step: step[-1])}
