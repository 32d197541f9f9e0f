"""From which confidence may a shallow exit be trusted? Two Betas over agreement.

FREE (arXiv 2310.05424, repository raymin0223/fast_robust_early_exit @3e503c5) fits one
Beta distribution to the confidences at which the shallow exit agreed with the full model
and one to the rest, and reads the threshold off where the first outweighs the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lgamma, log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vllm_accel.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

INITIAL_THRESHOLD = 0.9
NEVER_EXIT = 1.0
"""An exit needs a confidence above the threshold, and none is above 1."""

_EDGE = 1e-4  # a Beta density may be 0 or infinite at 0 and 1
_LEAST_OF_EACH = 10
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Beta:
    """A Beta distribution on [0, 1]."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    def log_density(
        self,
        x: Floats,  # [n] in (0, 1)
    ) -> Floats:
        """[n] natural logarithm of the density."""
        scale = lgamma(self.a) + lgamma(self.b) - lgamma(self.a + self.b)
        return (self.a - 1) * np.log(x) + (self.b - 1) * np.log1p(-x) - scale

    @classmethod
    def of_moments(
        cls,
        x: Floats,  # [n] in (0, 1)
        weights: NDArray[np.floating],  # [n] at least 0, some above
        *,
        least_variance: float = 0.0,
    ) -> Beta | None:
        """The Beta of the weighted mean and variance; None if all x are equal."""
        mean = float(np.average(x, weights=weights))
        variance = max(float(np.average((x - mean) ** 2, weights=weights)), least_variance)
        if variance < 1e-20:  # rounding, not spread
            return None
        a = mean * (mean * (1 - mean) / variance - 1)
        return cls(a, a * (1 - mean) / mean)


class BetaMixture:
    """P(shallow and full model agree | confidence), and the threshold FREE derives.

    Mode "published" repeats the repository's code, weak points included: each class keeps
    a trace of the other's weight, class sizes are ignored, the component of the larger
    mean counts as the agreeing one, and the threshold is one of ten values from 0.3 to
    0.9. With no disagreement, or nothing but, it answers 0.3.

    Mode "priors" weighs the components by how often each was seen and tells them apart by
    label. Its threshold, a multiple of 0.005, is the lowest above which P(agree) exceeds
    zeta throughout: 1, so no exit, where the surest are not to be trusted. Until there
    are 10 of each class it is 0.9, or 1 if what is missing is agreement alone; nothing is
    learnt while nothing exits, so a caller has to try an exit now and then.

    Args:
        mode: "published" or "priors".
        zeta: least P(agree) of an exit, 0.4 in the repository.

    Raises:
        ConfigError: the mode is another.
    """

    def __init__(
        self, mode: Literal["published", "priors"] = "published", *, zeta: float = 0.4
    ) -> None:
        if mode not in ("published", "priors"):
            raise ConfigError(
                f"Beta mixture mode {mode!r} is unknown: use published or priors."
            )
        self._mode = mode
        self._zeta = zeta
        self._pair: tuple[Beta, Beta] | None = None  # trusted, other
        self._counts = (0, 0)  # agreed, did not

    def fit(
        self,
        confidence: NDArray[np.floating],  # [n] in [0, 1]
        agree: Bools,  # [n]
        weights: Floats | None = None,  # [n] above 0; None: all count the same
    ) -> None:
        """Replaces what was fitted before; pairs without a finite confidence are left out.

        Confidence is whatever the threshold will be compared with, in FREE the margin
        between the two largest probabilities of the shallow exit.
        """
        finite = np.isfinite(confidence)
        x = np.clip(confidence[finite].astype(np.float64), _EDGE, 1 - _EDGE)
        agreed = agree[finite]
        self._counts = (int(agreed.sum()), int((~agreed).sum()))
        counts = np.ones_like(x) if weights is None else weights[finite]
        self._pair = _published(x, agreed, counts) if self._mode == "published" else None
        if self._mode == "priors" and min(self._counts) >= _LEAST_OF_EACH:
            self._pair = _by_label(x, agreed, counts)

    def probability(
        self,
        confidence: NDArray[np.floating],  # [n] in [0, 1]
    ) -> Floats:
        """[n] P(agree | confidence); published mode knows no class sizes.

        Where there are no two components, the smoothed share of agreement in mode
        "priors", and 0 in "published", whose undefined densities allow no exit.
        """
        agreed, not_agreed = self._counts
        x = np.clip(np.asarray(confidence, np.float64), _EDGE, 1 - _EDGE)
        if self._pair is None:
            share = (agreed + 1) / (agreed + not_agreed + 2)
            return np.full(x.shape, share if self._mode == "priors" else 0.0)
        trusted, other = self._pair
        odds = trusted.log_density(x) - other.log_density(x)
        if self._mode == "priors":
            odds += log(agreed / not_agreed)
        return 1 / (1 + np.exp(-np.clip(odds, -500, 500)))

    def threshold(self) -> float:
        """The confidence above which to exit; 0.9 before there is anything to fit."""
        if self._pair is None:
            return self._default()
        if self._mode == "published":
            return self._of_ten()
        return self._lowest_safe()

    def _default(self) -> float:
        agreed, not_agreed = self._counts
        only_disagreed = agreed < _LEAST_OF_EACH <= not_agreed
        if self._mode == "priors" and only_disagreed:
            return NEVER_EXIT
        return INITIAL_THRESHOLD

    def _of_ten(self) -> float:
        # The repository counts the values that pass and never asks which ones.
        grid = np.linspace(0.3, 0.9, 10)
        passing = int((self.probability(grid) > self._zeta).sum())
        return float(grid[min(10 - passing, 9)])

    def _lowest_safe(self) -> float:
        # Each step answers by its middle: at 0 and 1 a density is all extrapolation.
        edges = np.linspace(0, 1, 201)
        middles = (edges[:-1] + edges[1:]) / 2
        failing = np.flatnonzero(self.probability(middles) <= self._zeta)
        return float(edges[failing[-1] + 1]) if failing.size else 0.0


def _published(
    x: Floats,  # [n] in (0, 1)
    agreed: Bools,  # [n]
    weights: Floats,  # [n]
) -> tuple[Beta, Beta] | None:
    """The repository's one step: the component of the larger mean, then the other."""
    if not x.size:
        return None
    # Its label weight is 0.2, its floor 1e-4: what is left of the EM it meant to run.
    own, foreign = 0.2 / 0.2001, 1e-4 / 0.2001
    agreeing = Beta.of_moments(x, weights * np.where(agreed, own, foreign))
    other = Beta.of_moments(x, weights * np.where(agreed, foreign, own))
    if agreeing is None or other is None:
        return None
    return (agreeing, other) if agreeing.mean > other.mean else (other, agreeing)


def _by_label(
    x: Floats,  # [n] in (0, 1)
    agreed: Bools,  # [n] both kinds present
    weights: Floats,  # [n]
) -> tuple[Beta, Beta] | None:
    """The agreeing component, then the other; equal values get a little spread."""
    agreeing = Beta.of_moments(x, agreed * weights, least_variance=_LEAST_VARIANCE)
    other = Beta.of_moments(x, ~agreed * weights, least_variance=_LEAST_VARIANCE)
    return (agreeing, other) if agreeing and other else None
