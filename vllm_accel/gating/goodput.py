"""The `goodput` gate: draft where an accepted token is worth its measured time.

A draft token is worth verifying if the tokens per second with it beat those without
(renewal-reward: E[accepted] against the rate times the extra cost). Both sides are learnt
while serving: how likely a draft survives, by `calibrators`, what a step takes, by
`cost`.
"""

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_accel.errors import ConfigError
from vllm_accel.gating.calibrators import OnlineLogistic
from vllm_accel.gating.cost import StepCost, StepShape
from vllm_accel.gating.signals import DraftSignals, Signals

Floats = NDArray[np.float64]

RECONSIDER_EVERY = 8
"""Closed steps between looks at the signals, while the load stays as it is."""
HABIT_SHARE, HABIT_EVERY = 0.75, 8
"""Share of the longest drafts wanted lately from which on every eighth step is weighed
only, and the others draft all they can: where rows are cheap, weighing costs more."""
REOPEN_GAIN, STAY_GAIN = 1.1, 1.03
"""A closed gate opens for an expected rate this much better, an open one stays for this
much: what looks best of many ways to draft is flattered by the errors of its estimate."""
FIRST_STEPS = 3
"""Steps of either kind, drafting and plain, to measure at a new load before deciding."""
REFRESH_EVERY = 96
"""Steps of one kind before one of the other, so that neither price nor odds grow old."""

_VERDICTS_AT_ONCE = 16
_RECENT = 0.2
_BEFORE_PRIOR = (0.4, -0.35, 1.5)
"""Log odds that a draft token survives: constant, per nat, per share of recent ones."""
_AFTER_PRIOR = (0.0, -0.1, 0.5, 1.0)
"""The same, with the head's own log odds last."""


@dataclass(slots=True)
class _Waiting:
    """What was known of a request when it drafted; its verdict is not in yet."""

    before: Floats  # [features]
    after: Floats  # [draft_tokens, features]


@dataclass(slots=True)
class _Step:
    """The decision being made, between heads not run and drafts cut."""

    req_ids: list[str] = field(default_factory=list)
    features: Floats = field(default_factory=lambda: np.zeros((0, 2)))
    requests: int = 0
    trying: bool = False
    by_habit: bool = False


@dataclass(slots=True)
class Load:
    """What was decided at about this many requests."""

    closed: bool = False
    decisions: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """By whether anything drafted."""
    same: int = 0
    """Decisions since the last of the other kind."""
    share: float = 0.0
    """Of the longest drafts, what weighed decisions wanted lately."""
    to_try: int = 0
    """Steps of the other kind to come, to see what they take by now."""

    def note(self, drafting: bool, trying: bool) -> None:
        """Counts a decision."""
        self.decisions[drafting] += 1
        self.to_try = max(0, self.to_try - trying)
        flips = not trying and self.closed == drafting
        self.same = 0 if trying or flips else self.same + 1
        if not trying:
            self.closed = not drafting

    def note_share(self, share: float) -> None:
        """Takes in how much of the longest drafts a weighed step wanted."""
        self.share += _RECENT * (share - self.share)

    @property
    def least_gain(self) -> float:
        """Expected gain from which on to draft."""
        return REOPEN_GAIN if self.closed else STAY_GAIN

    def stays_closed(self) -> bool:
        """Whether this step may do without a look at the signals.

        A look costs a softmax over the vocabulary, or a shallow step, and a closed gate
        is to cost nothing: most closed steps have none while the load is what it was.
        """
        return self.closed and self.same % RECONSIDER_EVERY != 0

    def untried(self) -> bool | None:
        """The kind of step to try now, if any: True drafts, False does not."""
        for drafting in (False, True):
            if self.decisions[drafting] < FIRST_STEPS:
                return drafting
        if self.same >= REFRESH_EVERY:
            # The first plain step after drafts verifies them; those behind it do not.
            self.to_try = 1 if self.closed else FIRST_STEPS
        return self.closed if self.to_try else None


class Goodput:
    """Decides by expected tokens per second.

    Args:
        draft_tokens: most tokens drafted per request.
    """

    reason = "goodput"

    def __init__(self, draft_tokens: int) -> None:
        self.cost = StepCost()
        self._draft_tokens = draft_tokens
        self._before = OnlineLogistic(np.tile(_BEFORE_PRIOR, (draft_tokens, 1)))
        self._after = OnlineLogistic(np.tile(_AFTER_PRIOR, (draft_tokens, 1)))
        self._recent: dict[str, float] = {}
        self._usual = 0.4
        self._waiting: dict[str, _Waiting] = {}
        self._verdicts: list[tuple[_Waiting, int, int]] = []
        self._step = _Step()
        self._loads: defaultdict[int, Load] = defaultdict(Load)

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True where the heads are to run; see `Gate.admit`."""
        self._step = step = _Step(requests=signals.num_decoding)
        for req_id in signals.req_ids:  # a draft the engine dropped gets no verdict
            self._waiting.pop(req_id, None)
        load = self._loads[signals.num_decoding.bit_length()]
        kind = load.untried()
        step.trying = kind is not None
        if kind is False or (kind is None and load.stays_closed()):
            load.note(False, step.trying)
            return [False] * len(signals)
        if kind is None and _drafts_by_habit(load):
            step.by_habit = True
            return [True] * len(signals)
        features = self._features(signals)
        admitted = self._wanted(features, load, trying=step.trying)
        if not admitted.any():
            load.note(False, step.trying)
            load.note_share(0.0)
        pairs = zip(signals.req_ids, admitted, strict=True)
        step.req_ids = [req_id for req_id, yes in pairs if yes]
        step.features = features[admitted]
        return [bool(yes) for yes in admitted]

    def lengths(self, drafts: DraftSignals) -> list[int]:
        """How many draft tokens to verify of each admitted request."""
        step = self._step
        # Here and not in `admit`: a step with no room behind it asks and does not draft.
        self._loads[step.requests.bit_length()].note(True, step.trying)
        if step.by_habit:
            return [drafts.draft_tokens] * len(drafts)
        after = _after_features(step.features, drafts.confidence)
        lengths = self._lengths(after)
        for i, req_id in enumerate(step.req_ids):
            if lengths[i]:
                self._waiting[req_id] = _Waiting(step.features[i], after[i])
        return lengths

    def _lengths(self, after: Floats) -> list[int]:
        requests, heads, _ = after.shape
        if self._step.trying:
            return [heads] * requests
        odds = self._after.probability(after)
        lengths = self._best(odds.cumprod(axis=1), heads_run=True).lengths
        load = self._loads[self._step.requests.bit_length()]
        load.note_share(sum(lengths) / (heads * self._step.requests))
        return lengths

    def learn(self, req_id: str, verified: int, accepted: int) -> None:
        """Takes the verdict on a request's last draft in."""
        waiting = self._waiting.pop(req_id, None)
        if verified == 0:
            return
        share = accepted / verified
        self._usual += 0.02 * (share - self._usual)
        recent = self._recent.get(req_id, self._usual)
        self._recent[req_id] = recent + _RECENT * (share - recent)
        if waiting is not None:
            self._verdicts.append((waiting, verified, accepted))
        if len(self._verdicts) >= _VERDICTS_AT_ONCE:
            self._learn_all()

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes the measured time of a finished step in."""
        self.cost.observe(shape, seconds)

    def keep_only(self, req_ids: Container[str]) -> None:
        """Forgets requests that ended."""
        for book in (self._recent, self._waiting):
            for req_id in [known for known in book if known not in req_ids]:
                del book[req_id]

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        return {
            "cost": self.cost.state_dict(),
            "before": self._before.state_dict(),
            "after": self._after.state_dict(),
            "usual": self._usual,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts from what another gate learnt.

        Raises:
            ConfigError: it is not a state of this version, or of other heads.
        """
        try:
            cost, before, after = state["cost"], state["before"], state["after"]
            usual = float(state["usual"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"A saved gate state cannot be read ({error!r}): expected what the gate "
                "'goodput' of this version wrote; delete the file."
            ) from error
        self.cost.load_state_dict(cost)
        self._before.load_state_dict(before)
        self._after.load_state_dict(after)
        self._usual = usual

    def _features(self, signals: Signals) -> Floats:
        """[num_reqs, 2] entropy and the share of recent drafts accepted."""
        recent = [self._recent.get(req_id, self._usual) for req_id in signals.req_ids]
        return np.array([signals.entropy.tolist(), recent]).T

    def _wanted(self, features: Floats, load: Load, *, trying: bool) -> NDArray[np.bool_]:
        """[num_reqs] whose heads to run; one of them at most to try a closed gate."""
        repeated = np.repeat(features[:, None], self._draft_tokens, axis=1)
        survival = self._before.probability(repeated).cumprod(axis=1)
        if trying:
            likeliest = np.arange(len(features)) == survival.sum(axis=1).argmax()
            return likeliest if load.closed else np.ones(len(features), dtype=bool)
        best = self._best(survival)
        wanted = np.array(best.lengths) > 0
        return wanted & (best.gain >= load.least_gain)

    def _best(self, survival: Floats, *, heads_run: bool = False) -> "Drafts":
        # Without prompts: what these cost is the same whether drafts are accepted or not.
        plain = StepShape(self._step.requests, self._step.requests)
        return best_drafts(survival, plain, self.cost, heads_run=heads_run)

    def _learn_all(self) -> None:
        waiting, verified, accepted = zip(*self._verdicts, strict=True)
        self._verdicts.clear()
        places = np.arange(self._draft_tokens)[None]
        right = places < np.array(accepted)[:, None]
        known = (places <= np.array(accepted)[:, None]) & (
            places < np.array(verified)[:, None]
        )
        before = np.stack([w.before for w in waiting])[:, None].repeat(places.size, axis=1)
        after = np.stack([w.after for w in waiting])
        self._before.update(before, right, known)
        self._after.update(after, right, known)


@dataclass(frozen=True, slots=True)
class Drafts:
    """How many draft tokens of each request to verify."""

    lengths: list[int]
    gain: float
    """Expected tokens per second over those with no draft verified."""


def best_drafts(
    survival: Floats,  # [requests, draft_tokens] probabilities, falling along a draft
    plain: StepShape,
    cost: StepCost,
    *,
    heads_run: bool = False,
) -> Drafts:
    """The drafts with the best expected rate.

    Tokens are admitted in the order of their survival. A draft's tokens survive ever
    less, so what is admitted of a request is the beginning of its draft.

    Args:
        plain: the step without drafts; each of its requests gives one token.
        heads_run: the heads' time is spent already, for all these requests.
    """
    requests, draft_tokens = survival.shape
    order = np.argsort(-survival, axis=None, kind="stable")
    first_tokens = np.concatenate([[0], order % draft_tokens == 0])
    drafted_for = requests if heads_run else first_tokens.cumsum()
    rows = plain.decode_rows + np.arange(len(order) + 1)
    shapes = StepShape(rows, plain.requests, plain.prefill_tokens, drafted_for)
    seconds = cost.seconds(shapes)
    tokens = plain.requests + np.concatenate([[0.0], survival.ravel()[order].cumsum()])
    rates = tokens / np.maximum.accumulate(seconds)
    best = int(rates.argmax())
    lengths = np.bincount(order[:best] // draft_tokens, minlength=requests)
    return Drafts([int(n) for n in lengths], float(rates[best] / rates[0]))


def _after_features(
    features: Floats,  # [admitted, features]
    confidence: Tensor,  # [draft_tokens, admitted]
) -> Floats:
    """[admitted, draft_tokens, features + 1] with the heads' log odds."""
    sure = np.array(confidence.tolist()).T.clip(1e-4, 1 - 1e-4)
    after = np.empty((*sure.shape, features.shape[1] + 1))
    after[..., :-1] = features[:, None]
    after[..., -1] = np.log(sure / (1 - sure))
    return after


def _drafts_by_habit(load: Load) -> bool:
    habit = not load.closed and load.share >= HABIT_SHARE
    return habit and load.same % HABIT_EVERY != 0
