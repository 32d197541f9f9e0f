"""How probable is an outcome, given what was seen? Learnt online, one verdict at a time.

Bayesian logistic regression by Laplace's approximation, taken forward verdict by verdict
(Spiegelhalter and Lauritzen, Networks 20, 1990), with exponential forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
State = dict[str, list[Any]]

_FEATURE_LIMIT = 8.0
_LOGIT_LIMIT = 20.0
_LARGEST_MOVE = 2.0  # of any logit in one update: a Newton step may overshoot
_INFORMATION = 0.25  # of a verdict at probability 1/2, the most there is

# Alarm: the verdicts of late contradict the model by more than chance would.
_RECENT = 0.97  # weight of a verdict in "of late", per verdict since
_CHANCE = 12.0  # squared standard deviations
_ALARM_DECAY = 0.9


class OnlineLogistic:
    """P(outcome | features), learnt as verdicts come; one model per group.

    A group is what has its own weights, such as a head. What was learnt fades, faster
    while recent verdicts contradict it, and never below the prior's precision.

    Args:
        prior: [groups, 1 + features] weights to begin with, the constant's first.
        prior_strength: verdicts at probability 1/2 that would weigh as much as the prior.
        decay: what is left of a verdict's weight after the next of its group, in (0, 1].

    Features should be about 1 in size; beyond 8 they are cut off, and NaN counts as 0.

    Raises:
        ConfigError: the prior is no finite matrix, or a number is out of range.
    """

    def __init__(
        self, prior: Floats, *, prior_strength: float = 8.0, decay: float = 0.998
    ) -> None:
        weights = np.array(prior, dtype=np.float64)
        if weights.ndim != 2 or not weights.size or not np.isfinite(weights).all():
            raise ConfigError(
                f"Logistic prior of shape {weights.shape} cannot be used: give finite "
                "weights [groups, 1 + features]."
            )
        if not (prior_strength > 0 and 0 < decay <= 1):
            raise ConfigError(
                f"Logistic prior_strength={prior_strength}, decay={decay} cannot be used: "
                "the first must be above 0, the second above 0 and at most 1."
            )
        self._decay = decay
        self._floor = prior_strength * _INFORMATION * np.eye(weights.shape[1])
        self._weights = weights  # [groups, inputs]
        self._precision = np.repeat(self._floor[None], len(weights), axis=0)
        self._forget_recent()

    def probability(
        self,
        features: Floats,  # [n, groups, features]
    ) -> Floats:
        """[n, groups] float64, strictly between 0 and 1."""
        return _sigmoid((_inputs(features) * self._weights).sum(-1))

    def chance(self, features: Iterable[float]) -> float:
        """The probability of one line of the first group.

        In plain numbers: of a handful of lines, arrays take longer to make.
        """
        logit, *weights = self._weights[0].tolist()
        for weight, feature in zip(weights, features, strict=True):
            if feature == feature:  # not NaN
                logit += weight * min(_FEATURE_LIMIT, max(-_FEATURE_LIMIT, feature))
        return 1 / (1 + math.exp(-min(_LOGIT_LIMIT, max(-_LOGIT_LIMIT, logit))))

    def update(
        self,
        features: Floats,  # [n, groups, features]
        outcome: Bools,  # [n, groups] ignored where not known
        known: Bools,  # [n, groups]
    ) -> None:
        """Learns from the known outcomes; a group without one stays as it was."""
        inputs = _inputs(features)
        expected = _sigmoid((inputs * self._weights).sum(-1))
        surprise = np.where(known, outcome - expected, 0.0)
        information = known * expected * (1 - expected)
        slope = (inputs * surprise[..., None]).sum(0)  # [groups, inputs]
        by_group = inputs.transpose(1, 2, 0)  # [groups, inputs, n]
        curvature = (by_group * information.T[:, None]) @ by_group.transpose(0, 2, 1)

        count = known.sum(0)
        kept = self._kept(count, slope, curvature)[:, None, None]
        self._precision = kept * self._precision + (1 - kept) * self._floor + curvature
        step = np.linalg.solve(self._precision, slope[..., None])[..., 0]
        move = np.abs((inputs * step).sum(-1) * known).max(0, initial=_LARGEST_MOVE)
        self._weights += step * (_LARGEST_MOVE / move)[:, None]

    def state_dict(self) -> State:
        """What was learnt, in values JSON can hold."""
        return {
            "weights": self._weights.tolist(),  # [groups, 1 + features]
            "precision": self._precision.tolist(),  # [groups, 1 + features twice]
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up what another instance learnt; the alarm for shifts begins anew.

        Raises:
            ConfigError: the state is of other groups or features, or broken.
        """
        weights, precision = _arrays(state)
        if weights.shape != self._weights.shape:
            raise ConfigError(
                f"Logistic state has weights of shape {weights.shape} but this model needs "
                f"{self._weights.shape}: load a state of the same groups and features."
            )
        self._weights, self._precision = weights, precision
        self._forget_recent()

    def _forget_recent(self) -> None:
        self._recent_slope = np.zeros_like(self._weights)
        self._recent_variance = np.zeros_like(self._weights)

    def _kept(
        self,
        count: NDArray[np.int_],  # [groups]
        slope: Floats,  # [groups, inputs]
        curvature: Floats,  # [groups, inputs, inputs]
    ) -> Floats:
        """[groups] share of what was learnt that outlives these verdicts.

        Under a right model the slopes have mean 0 and the curvature's diagonal for their
        variance (a score test), so a large recent sum means that the data have shifted.
        """
        fade = (_RECENT**count)[:, None]
        self._recent_slope = fade * self._recent_slope + slope
        variance = curvature.diagonal(0, 1, 2)
        self._recent_variance = fade**2 * self._recent_variance + variance
        limit = _CHANCE * np.maximum(self._recent_variance, _INFORMATION)
        alarm = (self._recent_slope**2 > limit).any(-1)
        return np.where(alarm, min(_ALARM_DECAY, self._decay), self._decay) ** count


def merge(states: Sequence[State]) -> State:
    """What replicas learnt, as one state: weights averaged by precision.

    The precision is their mean, not their sum: replicas share a prior and often an
    earlier merged state, and what they share must not count again at every merge.

    Raises:
        ConfigError: there is no state, or they differ in groups or features.
    """
    read = [_arrays(state) for state in states]
    shapes = sorted({weights.shape for weights, _ in read})
    if len(shapes) != 1:
        raise ConfigError(
            f"Logistic states of shapes {shapes} cannot be merged: give at least one, "
            "all of the same groups and features."
        )
    precision = np.mean([precision for _, precision in read], axis=0)
    pulled = np.mean([(each @ weights[..., None]) for weights, each in read], axis=0)
    weights = np.linalg.solve(precision, pulled)[..., 0]
    return {"weights": weights.tolist(), "precision": precision.tolist()}


def _inputs(
    features: Floats,  # [n, groups, features]
) -> Floats:
    """[n, groups, 1 + features] a constant 1, then the features, made safe."""
    inputs = np.ones((*features.shape[:-1], features.shape[-1] + 1))
    inputs[..., 1:] = features
    inputs[np.isnan(inputs)] = 0.0
    return np.clip(inputs, -_FEATURE_LIMIT, _FEATURE_LIMIT, out=inputs)


def _sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT)))


def _arrays(state: State) -> tuple[Floats, Floats]:
    """Weights [groups, inputs] and precision [groups, inputs, inputs] of a state."""
    try:
        weights = np.array(state["weights"], dtype=np.float64)
        precision = np.array(state["precision"], dtype=np.float64)
        whole = weights.ndim == 2 and precision.shape == (*weights.shape, weights.shape[1])
        # Also what makes precision usable: Cholesky refuses what is not positive.
        whole = whole and bool(np.isfinite(weights).all() and np.isfinite(precision).all())
        np.linalg.cholesky(precision)
    except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise _broken() from error
    if not whole:
        raise _broken()
    return weights, precision


def _broken() -> ConfigError:
    return ConfigError(
        "Logistic state is broken: expected finite `weights` [groups, 1 + features] and "
        "`precision` [groups, 1 + features, 1 + features], positive definite; "
        "delete it and learn anew."
    )
