"""A drafting step of FREE, and who ends it."""

import itertools

import numpy as np
import pytest
import torch

from vllm_accel import ConfigError
from vllm_accel.free.drafter import FreeDrafter, Stackable
from vllm_accel.free.exit_head import ExitAdapter, ExitHead, ExitSignals
from vllm_accel.free.gates import (
    ExitGate,
    Learning,
    LearntThreshold,
    Never,
    Threshold,
    make_gate,
)
from vllm_accel.free.quality import ExitQuality
from vllm_accel.free.resume import split
from vllm_accel.free.stack import ExitStacks, Seen
from vllm_accel.speculate import AHEAD, NO_ROOM, StepReport

WIDTH, VOCAB = 6, 8
ALWAYS = Threshold(-1.0, "always")


class Model:
    """A shallow model that says token + 1, ever less surely the further it goes."""

    def __init__(self):
        self.steps = []
        self.head = ExitHead(ExitAdapter("none", 0, 0), lambda x: x, self._logits)

    def shallow(self, rows):
        self.steps.append(list(zip(rows.req_ids, rows.positions, strict=True)))
        states = torch.zeros(len(rows.req_ids), 2 * WIDTH)
        states[:, 0] = torch.tensor(rows.token_ids) + 1
        states[:, WIDTH + 1] = 5.0 - torch.tensor([p % 10 for p in rows.positions])
        return self.head.read(*states.chunk(2, dim=-1))

    def _logits(self, states):
        sharp = states[:, 1:2].clamp(min=0.1)
        return sharp * torch.nn.functional.one_hot(states[:, 0].long() % VOCAB, VOCAB)


def drafter(gate, cap=4):
    model = Model()
    stacks = ExitStacks(cap=cap, max_reqs=4, state_width=2 * WIDTH)
    return model, FreeDrafter(stacks, gate)


def two(room=(9, 9), rows=(0, 1)):
    return Stackable(
        req_ids=["a", "b"],
        rows=rows,
        next_tokens=[1, 3],
        room=room,
        positions=[10, 20],
        stop_token_ids=[(), {5}],
        quality=[0.99, 0.9],
    )


def test_requests_are_drafted_for_together_until_each_has_its_end():
    model, free = drafter(ALWAYS)
    report = StepReport()
    drafts = free.draft(two(room=(3, 9)), model.shallow, report)
    assert drafts == [[2, 3, 4], [4, 5]]  # the room of one, a stop token of the other
    assert model.steps == [[("a", 10), ("b", 20)], [("a", 11), ("b", 21)], [("a", 12)]]
    assert report.draft_lengths == {3: 1, 2: 1}
    assert report.gate["open", "always"] == report.drafted_for == 2


def test_a_threshold_ends_a_draft_at_the_first_doubt():
    model, free = drafter(Threshold(0.8))
    assert free.draft(two(), model.shallow, StepReport()) == [[2, 3], [4, 5]]
    assert len(model.steps) == 3  # the doubtful row is run, and kept
    assert len(free.stacks.kept_rows("a", 10, [1, 2, 3])) == 3


def test_a_closed_gate_runs_no_layer():
    model, free = drafter(Never())
    report = StepReport()
    assert free.draft(two(), model.shallow, report) == [[], []]
    assert (model.steps, len(free.stacks)) == ([], 0)
    assert report.gate["closed", "never"] == 2


def test_a_step_with_no_room_behind_it_drafts_nothing_and_says_who_wanted_to():
    model, free = drafter(ALWAYS)
    report = StepReport()
    free.draft(two(), model.shallow, report, may_draft=False)
    assert model.steps == []
    assert report.gate["closed", AHEAD] == report.wanted == 2


def test_no_room_and_no_token_are_told_apart():
    model, free = drafter(ALWAYS)
    report = StepReport()
    drafts = free.draft(two(room=(0, 3), rows=(0, -1)), model.shallow, report)
    assert drafts == [[], []]
    assert report.gate["closed", NO_ROOM] == 1
    assert report.asked == 0


class TwoSteps(Threshold):
    """Ends the drafting of all after two shallow steps."""

    def __init__(self):
        super().__init__(-1.0, "two_steps")
        self._steps = 0

    def goes_on(self, req_ids):
        self._steps += 1
        return self._steps < 2


def test_the_gate_may_end_the_drafting_of_all():
    model, free = drafter(TwoSteps())
    assert free.draft(two(), model.shallow, StepReport()) == [[2, 3], [4, 5]]
    assert len(model.steps) == 2


def test_rows_are_told_apart_by_what_is_known_of_them():
    model, free = drafter(ALWAYS)
    free.draft(two(room=(3, 9)), model.shallow, StepReport())
    # A prompt's rows, then all of a's, the last draft without a state, then b's, cut.
    tokens = np.array([7, 7, 7, 1, 2, 3, 4, 3, 4])
    rows = split(free.stacks, ["new", "a", "b"], [0, 3, 7, 9], [0, 10, 20], tokens)
    assert rows.kept.tolist() == [3, 4, 5, 7, 8]
    assert rows.rest.tolist() == [0, 1, 2, 6]
    assert rows.requests.tolist() == [0, 1]
    assert rows.lens.tolist() == [3, 1]
    kept = free.stacks.states[torch.from_numpy(rows.states), 0].tolist()
    assert kept == [2, 3, 4, 4, 5]


def test_nothing_is_kept_at_another_position_or_of_another_token():
    model, free = drafter(ALWAYS)
    free.draft(two(), model.shallow, StepReport())
    assert split(free.stacks, ["a", "b"], [0, 1, 2], [11, 20], np.array([1, 9])) is None


def seen(*pairs):
    confidence, agree = zip(*pairs, strict=True)
    return Seen("a", 1, list(confidence), list(agree))


def test_the_learnt_threshold_moves_when_a_sequence_begins():
    gate = LearntThreshold()
    first = gate.threshold
    gate.admit(["a"], 1)
    gate.learn(seen(*[(0.5 + 0.04 * i, True) for i in range(10)], (0.1, False)))
    gate.admit(["a"], 1)
    assert gate.threshold == first
    gate.admit(["a", "b"], 2)
    assert gate.threshold < first
    assert gate.updates == 1


def test_a_stack_without_a_draft_teaches_the_published_estimator_nothing():
    gate = LearntThreshold()
    gate.learn(Seen("a", 0, [0.99], [False]))
    gate.admit(["a"], 1)
    assert gate.updates == 0


def test_the_published_estimator_is_frozen_after_so_many_sequences():
    gate = LearntThreshold()
    gate.learn(seen((0.9, True), (0.2, False)))
    begin_sequences(gate, 305)
    assert gate.updates == 300


NUMBERS = itertools.count()


def begin_sequences(gate, count):
    for _ in range(count):
        new = str(next(NUMBERS))
        gate.admit([new], 1)
        gate.keep_only({new})


@pytest.mark.parametrize(("most", "updates"), [(2, 2), (0, 0), (None, 400)])
def test_the_estimators_updates_end_where_asked(most, updates):
    gate = LearntThreshold(Learning(max_updates=most))
    gate.learn(seen((0.9, True), (0.2, False)))
    begin_sequences(gate, 400)
    assert gate.updates == updates


def test_the_estimator_waits_for_as_many_of_each_as_asked():
    gate = LearntThreshold(Learning(min_observations=2))
    gate.learn(seen((0.9, True), (0.8, True), (0.2, False)))
    begin_sequences(gate, 1)
    assert gate.updates == 0
    gate.learn(seen((0.3, False)))
    begin_sequences(gate, 1)
    assert gate.updates == 1


def test_decay_lets_the_estimator_follow_another_text():
    def after(decay):
        gate = LearntThreshold(Learning(max_updates=None, decay=decay))
        for middle in (0.25, 0.75):  # below it the choices are wrong, above it right
            for _ in range(40):
                pairs = [(c / 20, c / 20 > middle) for c in range(1, 20)]
                gate.learn(seen(*pairs))
                begin_sequences(gate, 1)
        return gate.threshold

    assert after(0.8) > after(1.0)


def served(gate, quality, honesty, tokens=6000):
    """(share of tokens agreed with, share that exited) of one long answer.

    A shallow choice of confidence c is right with the chance c ** honesty.
    """
    draw = np.random.default_rng(0)
    wrong = exited = given = 0
    while given < tokens:
        confidence, agree, drafted = [], [], 0
        for _ in range(4):
            sure = float(draw.beta(2, 1))
            said = two_best(sure, quality)
            confidence.append(said.confidence.item())
            agree.append(bool(draw.random() < sure**honesty))
            gate.exits(said)
            if gate.final(said) != [True]:
                break
            drafted += 1
        gate.learn(Seen("a", drafted, confidence, agree))
        wrong += agree[:drafted].count(False)
        exited += drafted
        given += drafted + 1
    return 1 - wrong / given, exited / given


def two_best(confidence, quality):
    best = torch.tensor([[(1 + confidence) / 2, (1 - confidence) / 2]])
    return ExitSignals(best.log(), ["a"], [quality])


@pytest.mark.parametrize("honesty", [0.05, 1.0])
@pytest.mark.parametrize("quality", [0.99, 0.9])
def test_the_share_of_tokens_asked_for_is_met_whatever_the_text(quality, honesty):
    agreed, exited = served(ExitQuality(4, 0.9), quality, honesty)
    assert agreed > quality - 0.005
    assert agreed < quality + 0.005 or exited > 0.79, "more could exit"
    assert exited > 0.02


def test_a_text_that_is_easier_or_asks_for_less_exits_more():
    shares = [served(ExitQuality(4, 0.9), q, h)[1] for q, h in ((0.99, 1), (0.9, 1))]
    easy = served(ExitQuality(4, 0.9), 0.99, 0.05)[1]
    assert shares[0] < shares[1]
    assert shares[0] < easy


def test_a_draft_that_was_taken_back_counts_for_nothing():
    gates = [ExitQuality(4, 0.5) for _ in range(3)]
    for gate, stood in zip(gates, (None, 1, 3), strict=True):
        gate.exits(two_best(0.9, 0.9))
        gate.learn(Seen("a", 3, [0.9] * 3, [True, False, False], stood))
    whole, cut, same = (gate.threshold_of("a") for gate in gates)
    assert cut < 0.5 < whole == same


def test_requests_that_ask_for_different_shares_have_thresholds_of_their_own():
    gate = ExitQuality(4, 0.5)
    said = ExitSignals(torch.zeros(2, 4), ["a", "b"], [0.99, 0.9])
    gate.exits(said)
    gate.learn(Seen("a", 2, [0.9, 0.9], [False, True]))
    assert gate.threshold_of("a") > gate.threshold_of("b") == 0.5
    gate.keep_only({"b"})
    gate.learn(Seen("b", 1, [0.9], [True]))
    assert gate.threshold_of("b") < 0.5


@pytest.mark.parametrize(
    "name", ["goodput", "quality", "beta_mixture", "threshold", "always", "never"]
)
def test_a_name_makes_a_gate(name):
    gate = make_gate(name, draft_tokens=4, threshold=0.5)
    assert isinstance(gate, ExitGate)
    assert gate.reason == name


@pytest.mark.parametrize("path", ["no.such:Gate", "vllm_accel.testing:RandomGate"])
def test_what_is_no_gate_is_refused(path):
    with pytest.raises(ConfigError, match="expected"):
        make_gate(path, draft_tokens=4, threshold=0.5)
