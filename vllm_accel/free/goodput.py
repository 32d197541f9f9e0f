"""The `goodput` gate of FREE: shallow steps while they are worth their measured time.

A shallow step costs its own time and one more row for the deep layers, and gives a token
if shallow and deep model agree on it and on all before it. Both sides are learnt while
serving: the chance from the shallow model's confidence, the time by `gating.cost`. The
gate goes on while a second spent on it gives more tokens than a second does at the best
rate in sight (renewal-reward), and opens where stacks of late gave more than plain steps.
"""

import math
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_accel.free.exit_head import ExitSignals
from vllm_accel.free.prospect import Prospect
from vllm_accel.free.stack import Seen
from vllm_accel.gating.calibrators import Floats, OnlineLogistic
from vllm_accel.gating.cost import StepCost, StepShape
from vllm_accel.gating.goodput import FIRST_STEPS, REFRESH_EVERY, REOPEN_GAIN, Load

_STACKS_AT_ONCE = 16
_LOOKS = 8
"""Stacks to be seen, ended as the gate wants, before what they give decides."""
_FIRST_WAIT, _LOOKS_AGAIN = 6, 2
"""Closed steps before that many are opened again to look; the wait doubles every time, up
to `REFRESH_EVERY`: the first tokens of an answer may be harder than the rest."""
_RECENT = 0.1
_USUAL = 0.6
_PRIOR = (-1.0, 0.8, 2.0)
"""Log odds that both agree: constant, per log odds of confidence, per recent share."""


@dataclass(slots=True)
class _Step:
    """What is being drafted now."""

    requests: int = 0
    """That decode."""
    opened: int = 0
    trying: bool = False
    to_the_end: bool = False
    """Drafts all it can, so that prices of all lengths are known."""
    noted: bool = False
    rate: float = 0.0
    """Tokens per second of the best plan."""
    shallow_steps: int = 0
    shallow_rows: int = 0
    drafted: int = 0
    row_seconds: float | None = None
    """What one more row costs that skips the first layers, once it was asked."""
    survival: dict[str, float] = field(default_factory=dict)
    """Per request, the chance that its drafts so far stand."""
    foreseen: list[float] = field(default_factory=list)
    """What the shallow steps to come cost, the next one last; of as many requests and
    after as many steps as `foreseen_for` says."""
    foreseen_for: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many of the likeliest requests to open, and what that gives."""

    opened: int
    rate: float
    gain: float
    """Tokens per second over those of a plain step."""


class ExitGoodput:
    """Decides by expected tokens per second.

    Args:
        draft_tokens: most tokens drafted per request.
    """

    reason = "goodput"

    def __init__(self, draft_tokens: int) -> None:
        self.cost = StepCost()
        self._draft_tokens = draft_tokens
        self._odds = OnlineLogistic(np.array([_PRIOR]))
        self._recent: dict[str, float] = {}
        self._usual = _USUAL
        self._seen: list[tuple[float, Seen]] = []
        self._loads: defaultdict[int, Load] = defaultdict(Load)
        self._waits: defaultdict[int, int] = defaultdict(lambda: _FIRST_WAIT)
        self._prospect = Prospect(draft_tokens)
        self._unwanted: set[str] = set()
        self._step = _Step()

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """[num_reqs] True where to run the shallow layers; see `ExitGate.admit`."""
        self._step = step = _Step(requests=num_decoding)
        load = self._loads[num_decoding.bit_length()]
        kind = self._kind_to_try(load, num_decoding.bit_length())
        step.trying = kind is not None
        step.to_the_end = step.trying and load.decisions[True] < FIRST_STEPS
        if kind is False or (kind is None and load.stays_closed()):
            load.note(False, step.trying)
            return [False] * len(req_ids)
        favour = np.array([self._prospect.favour(req_id) for req_id in req_ids])
        opened = self._opened(favour, load)
        if not opened:
            load.note(False, step.trying)
        step.opened = opened
        likeliest = set(np.argsort(-favour, kind="stable")[:opened].tolist())
        admitted = [i in likeliest for i in range(len(req_ids))]
        for req_id, yes in zip(req_ids, admitted, strict=True):
            if yes:
                mark = self._unwanted.add if step.to_the_end else self._unwanted.discard
                mark(req_id)
        return admitted

    def _kind_to_try(self, load: Load, digits: int) -> bool | None:
        """The kind of step to try now, if any: True drafts, False does not."""
        kind = load.untried()
        if kind is not None:
            return kind
        if not load.closed:
            self._waits[digits] = _FIRST_WAIT
            return True if self._prospect.num_stacks < _LOOKS else None
        if load.same < self._waits[digits]:
            return None
        self._waits[digits] = min(REFRESH_EVERY, 2 * self._waits[digits])
        load.to_try = _LOOKS_AGAIN
        return True

    def exits(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] True where the shallow choice is worth a row of the deep layers."""
        step = self._step
        self._begin_shallow_step(said)
        chances = self._chances(said)
        for req_id, chance in zip(said.req_ids, chances, strict=True):
            step.survival[req_id] = step.survival.get(req_id, 1.0) * chance
        least = 0.0 if step.to_the_end else step.rate * self._row_seconds()
        exits = [step.survival[req_id] > least for req_id in said.req_ids]
        step.drafted += sum(exits)
        return exits

    def final(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] False: it weighs speed alone."""
        return [False] * len(said)

    def _begin_shallow_step(self, said: ExitSignals) -> None:
        step = self._step
        if not step.noted:  # here: a step with no room behind it asks and does not
            self._loads[step.requests.bit_length()].note(True, step.trying)
            step.noted = True
        step.shallow_steps += 1
        step.shallow_rows += len(said)

    def goes_on(self, req_ids: Sequence[str]) -> bool:
        """Whether one more shallow step of these gives more than its time is worth."""
        step = self._step
        if step.to_the_end or not req_ids:
            return True
        expected = sum(
            step.survival[req_id] * self._recent.get(req_id, self._usual)
            for req_id in req_ids
        )
        return expected > step.rate * self._next_seconds(len(req_ids))

    def learn(self, seen: Seen) -> None:
        """Takes in where shallow and deep model agreed."""
        recent = self._recent.get(seen.req_id, self._usual)
        self._seen.append((recent, seen))
        for agree in seen.agree:
            recent += _RECENT * (agree - recent)
            self._usual += 0.01 * (agree - self._usual)
        self._recent[seen.req_id] = recent
        if seen.req_id not in self._unwanted:
            self._prospect.learn(seen.req_id, seen.drafted, seen.given)
            self._look_sooner(seen)
        if len(self._seen) >= _STACKS_AT_ONCE:
            self._learn_all()

    def _look_sooner(self, seen: Seen) -> None:
        """Where a closed gate looked and the stack was worth its time."""
        requests, looked = self._step.requests, min(seen.drafted + 1, self._draft_tokens)
        digits = requests.bit_length()
        if not self._loads[digits].closed or not seen.given:
            return
        looks = np.array([0, looked])
        shapes = StepShape(
            requests + np.array([0, seen.drafted]),
            requests,
            0,
            np.array([0, 1]),
            shallow_steps=looks,
            shallow_rows=looks,
            kept_rows=looks,
        )
        plain, opened = self.cost.seconds(shapes)
        if (requests + seen.given) * plain > REOPEN_GAIN * requests * opened:
            self._waits[digits] = _FIRST_WAIT

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes the measured time of a finished step in."""
        self.cost.observe(shape, seconds)

    def keep_only(self, req_ids: Container[str]) -> None:
        """Forgets requests that ended."""
        for req_id in [known for known in self._recent if known not in req_ids]:
            del self._recent[req_id]
        self._prospect.keep_only(req_ids)
        self._unwanted = {known for known in self._unwanted if known in req_ids}

    def _opened(self, favour: Floats, load: Load) -> int:
        """How many of the likeliest requests draft; one at most to try a closed gate."""
        if self._step.to_the_end:
            return 1 if load.closed else len(favour)
        plan = self._best(-np.sort(-favour))
        self._step.rate = plan.rate
        if self._step.trying:
            return 1 if load.closed else len(favour)
        return plan.opened if plan.gain >= load.least_gain else 0

    def _best(
        self,
        favour: Floats,  # [num_reqs] falling
    ) -> _Plan:
        """The best of all numbers of requests and of shallow steps, as far as foreseen."""
        requests, most, prospect = self._step.requests, self._draft_tokens, self._prospect
        steps = np.arange(1, most + 1)
        stood = np.minimum(favour[:, None] * prospect.stood, prospect.drafted)
        tokens = requests + stood.cumsum(axis=1).cumsum(axis=0)
        opened = np.arange(1, len(favour) + 1)[:, None]
        looked = (opened * prospect.looked.cumsum()).ravel()
        shapes = StepShape(
            requests + (opened * prospect.drafted.cumsum()).ravel(),
            requests,
            0,
            (opened + 0 * steps).ravel(),
            # The longest stack of all says how often the layers are run.
            shallow_steps=(1 - (1 - prospect.looked) ** opened).cumsum(axis=1).ravel(),
            shallow_rows=looked,
            kept_rows=looked,
        )
        rates = tokens.ravel() / self.cost.seconds(shapes)
        plain = requests / float(self.cost.seconds(StepShape(requests, requests))[0])
        best = int(rates.argmax())
        rate = max(float(rates[best]), plain)
        return _Plan(best // most + 1, rate, float(rates[best]) / plain)

    def _chances(self, said: ExitSignals) -> list[float]:
        """[num_reqs] that the deep layers will agree."""
        recent = [self._recent.get(req_id, self._usual) for req_id in said.req_ids]
        pairs = zip(said.sureness, recent, strict=True)
        return [self._odds.chance(_features(sure, of_late)) for sure, of_late in pairs]

    def _next_seconds(self, going_on: int) -> float:
        """What one more shallow step costs, of as many requests.

        Foreseen for all steps to come as long as all of these go on.
        """
        step = self._step
        if step.foreseen_for != (going_on, step.shallow_steps) or not step.foreseen:
            most = max(1, self._draft_tokens - step.shallow_steps)
            more = np.arange(1 + most, dtype=np.float64)
            seconds = self.cost.seconds(self._shape(more, going_on))
            step.foreseen = np.diff(seconds)[::-1].tolist()
        step.foreseen_for = going_on, step.shallow_steps + 1
        return step.foreseen.pop()

    def _shape(self, more_steps: Floats, going_on: int) -> StepShape:
        """The step as it is, and with so many more shallow steps."""
        step = self._step
        rows = step.drafted + more_steps * going_on
        return StepShape(
            step.requests + rows,
            step.requests,
            0,
            step.opened,
            shallow_steps=step.shallow_steps + more_steps,
            shallow_rows=step.shallow_rows + more_steps * going_on,
            kept_rows=step.drafted + more_steps * going_on,
        )

    def _row_seconds(self) -> float:
        step = self._step
        if step.row_seconds is None:
            rows = np.array([0, 1]) + step.requests
            shapes = StepShape(rows, step.requests, kept_rows=rows)
            less, more = self.cost.seconds(shapes)
            step.row_seconds = max(0.0, float(more - less))
        return step.row_seconds

    def _learn_all(self) -> None:
        recent = [r for r, seen in self._seen for _ in seen.agree]
        sure = [c for _, seen in self._seen for c in seen.confidence]
        agree = [a for _, seen in self._seen for a in seen.agree]
        self._seen.clear()
        if agree:
            outcome = np.array(agree)[:, None]
            features = np.array(list(map(_features, sure, recent)))[:, None]
            self._odds.update(features, outcome, np.ones_like(outcome))


def _features(confidence: float, recent: float) -> tuple[float, float]:
    """Log odds of a confidence in [0, 1], and the share that agreed of late."""
    sure = min(1 - 1e-3, max(1e-3, confidence))
    return math.log(sure / (1 - sure)), recent
