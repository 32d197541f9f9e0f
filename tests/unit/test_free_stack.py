"""The stacks: what waits at the exit, for whom, and what the deep layers find of it.

`Host` is an engine in small: it serves several requests at once on `ToyDecoder` through
`ExitStacks` alone, as our adapter does on vLLM.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from free_reference import Free, ToyLayers

from vllm_accel.free.exit_head import ExitAdapter, ExitHead, ExitSignals
from vllm_accel.free.stack import ExitStacks, Seen, first_to_undo
from vllm_accel.paging import num_pages
from vllm_accel.spans import Lane, Span, Stream, view_of
from vllm_accel.speculate import draft_room
from vllm_accel.toy import ToyDecoder

WIDTH = 3


def stacks(cap=3, max_reqs=2):
    return ExitStacks(cap=cap, max_reqs=max_reqs, state_width=WIDTH)


def step(book, *choices):
    """One shallow step; a choice is (predicted, exits), the state tells the position."""
    rows = book.next_rows()
    states = torch.tensor(rows.positions)[:, None].expand(-1, WIDTH).float()
    predicted, exits = zip(*choices, strict=True)
    sure = [0.9 if leaves else 0.1 for leaves in exits]
    book.push(rows, states, predicted, sure, exits)
    return rows


def test_a_doubtful_choice_ends_the_draft_and_its_row_is_kept():
    book = stacks()
    assert book.open("a", 10, 7, room=9)
    assert step(book, (8, True)).token_ids == [7]
    rows = step(book, (5, False))
    assert (rows.token_ids, rows.positions) == ([8], [11])
    assert book.next_rows() is None
    assert book.drafts("a") == [8]
    kept = book.kept_rows("a", 10, [7, 8])
    assert book.states[kept, 0].tolist() == [10, 11]


def test_the_cap_ends_the_draft_and_the_last_draft_has_no_row():
    book = stacks(cap=2)
    book.open("a", 10, 7, room=9)
    step(book, (8, True))
    step(book, (9, True))
    assert book.next_rows() is None
    assert book.drafts("a") == [8, 9]
    assert len(book.kept_rows("a", 10, [7, 8, 9])) == 2


def test_room_ends_the_draft_before_the_cap():
    book = stacks(cap=3)
    book.open("a", 0, 7, room=1)
    step(book, (8, True))
    assert book.next_rows() is None


def test_a_stop_token_ends_the_draft():
    book = stacks(cap=3)
    book.open("a", 0, 7, room=9, stop_token_ids={2})
    step(book, (2, True))
    assert book.next_rows() is None
    assert book.drafts("a") == [2]


def test_without_room_nothing_is_drafted():
    book = stacks()
    assert not book.open("a", 0, 7, room=0)
    assert book.next_rows() is None
    assert book.drafts("a") == []
    assert book.kept_rows("a", 0, [7]) == []


def test_more_requests_than_places_wait():
    book = stacks(max_reqs=1)
    assert book.open("a", 0, 7, room=1)
    assert not book.open("b", 0, 7, room=1)
    book.drop("a")
    assert book.open("b", 0, 7, room=1)


def test_requests_are_drafted_for_together_and_end_apart():
    book = stacks()
    book.open("a", 10, 7, room=9)
    book.open("b", 20, 6, room=9)
    first = step(book, (1, False), (2, True))
    assert first.req_ids == ["a", "b"]
    second = step(book, (3, False))
    assert (second.req_ids, second.token_ids, second.positions) == (["b"], [2], [21])
    assert (book.drafts("a"), book.drafts("b")) == ([], [2])
    assert not set(book.kept_rows("a", 10, [7])) & set(book.kept_rows("b", 20, [6, 2]))


def test_the_policy_may_close_a_stack_and_its_drafts_stay():
    book = stacks()
    book.open("a", 0, 7, room=9)
    step(book, (8, True))
    book.close(["a"])
    assert book.next_rows() is None
    assert book.drafts("a") == [8]
    assert len(book.kept_rows("a", 0, [7, 8])) == 1


@pytest.fixture
def drafted():
    """Request "a" at 10 with drafts 8, 9 after token 7, and three kept rows."""
    book = stacks()
    book.open("a", 10, 7, room=9)
    for choice in ((8, True), (9, True), (4, False)):
        step(book, choice)
    return book


@pytest.mark.parametrize(
    ("req_id", "position", "token_ids", "rows"),
    [
        ("a", 10, [7, 8, 9], 3),
        ("a", 10, [7, 8], 2),  # the engine cut the draft
        ("a", 10, [7, 5, 9], 1),  # it verifies something else
        ("a", 10, [6, 8, 9], 0),
        ("a", 9, [7, 8, 9], 0),  # it begins elsewhere
        ("a", 10, [7, 8, 9, 1], 3),
        ("b", 10, [7, 8, 9], 0),
    ],
)
def test_states_are_matched_by_request_position_and_token(
    drafted, req_id, position, token_ids, rows
):
    assert len(drafted.kept_rows(req_id, position, token_ids)) == rows


@pytest.mark.parametrize(
    ("deep", "agree"),
    [
        ([8, 9, 4], [True, True, True]),
        ([8, 9, 5], [True, True, False]),  # of the doubtful choice too
        ([8, 1], [True, False]),  # mode `verify` says no more after a disagreement
        ([8, 1, 4], [True, False, True]),  # mode `exit` does
        ([8, 9], [True, True]),  # the engine cut the draft
    ],
)
def test_the_deep_layers_word_is_matched_with_the_confidence_of_its_row(
    drafted, deep, agree
):
    seen = drafted.settle("a", 10, deep)
    assert seen == Seen("a", 2, [0.9, 0.9, 0.1][: len(agree)], agree)
    assert len(drafted) == 0


def test_a_word_on_another_position_teaches_nothing(drafted):
    assert drafted.settle("a", 11, [8, 9, 4]) is None
    assert drafted.settle("b", 10, [8]) is None
    assert len(drafted) == 0


def test_a_row_that_was_not_run_has_no_verdict():
    book = stacks(cap=1)
    book.open("a", 0, 7, room=9)
    step(book, (8, True))
    assert book.settle("a", 0, [8, 3]) == Seen("a", 1, [0.9], [True])


def test_a_preempted_request_keeps_nothing(drafted):
    drafted.drop("a")
    assert drafted.kept_rows("a", 10, [7, 8, 9]) == []
    drafted.drop("a")


def test_requests_that_ended_give_their_places_back():
    book = stacks(max_reqs=1)
    for i in range(5):
        assert book.open(str(i), 0, 7, room=1)
        book.keep_only({"x"})
    assert len(book) == 0


def test_opening_anew_forgets_the_old_stack(drafted):
    drafted.open("a", 13, 1, room=9)
    assert drafted.drafts("a") == []
    assert drafted.kept_rows("a", 10, [7]) == []


@pytest.mark.parametrize(
    ("limit", "first"), [(None, None), (5.0, None), (2.0, 1), (0.05, 0), (0.3, 1)]
)
def test_rollback_cuts_at_the_first_surprise(limit, first):
    assert first_to_undo([0.1, 3.0, 0.2, 4.0], limit) == first


@dataclass
class Request:
    prompt: list[int]
    pages: range
    token_ids: list[int] = field(default_factory=list)
    """All of them, the prompt included."""


class Host:
    """Serves requests together; a step is what vLLM's is: scheduled rows, then drafts."""

    def __init__(self, toy, prompts, *, mode, threshold, cap, max_tokens):
        self.toy, self.mode, self.threshold = toy, mode, threshold
        self.max_tokens, self.exit_layer = max_tokens, 2
        pages = [range(1 + 20 * i, 21 + 20 * i) for i in range(len(prompts))]
        self.requests = {
            str(i): Request(prompt, pages[i]) for i, prompt in enumerate(prompts)
        }
        self.head = ExitHead(ExitAdapter("none", 0, 0), toy.norm, toy.lm_head)
        self.book = ExitStacks(cap=cap, max_reqs=len(prompts), state_width=32)
        self.seen: list[Seen] = []
        self.saved = 0

    def run(self):
        for request in self.requests.values():
            request.token_ids = list(request.prompt)
        begins = dict.fromkeys(self.requests, 0)
        while begins:
            self._target_step(begins)
            begins = {i: self._known(i) - 1 for i in self.requests if self._room(i) >= 0}
            for req_id, begin in begins.items():
                token = self.requests[req_id].token_ids[-1]
                self.book.open(req_id, begin, token, self._room(req_id))
            while rows := self.book.next_rows():
                self._shallow_step(rows)
        return [self.requests[i].token_ids[len(r.prompt) :] for i, r in self._items()]

    def _items(self):
        return self.requests.items()

    def _known(self, req_id):
        return len(self.requests[req_id].token_ids)

    def _room(self, req_id):
        return draft_room(
            num_tokens=self._known(req_id),
            num_prompt_tokens=len(self.requests[req_id].prompt),
            max_model_len=10**6,
            max_tokens=self.max_tokens,
            min_tokens=0,
        )

    def _span(self, first, stop, hidden, rows):
        """rows: [(req_id, first position, count)]"""
        lanes = [
            Lane(
                req_id,
                np.arange(begin, begin + count),
                np.arange(num_pages(begin + count, self.toy.block_size)),
                begin + count,
            )
            for req_id, begin, count in rows
        ]
        view = view_of(lanes, lambda i: self.requests[i].pages, self.toy.block_size)
        positions = np.concatenate([lane.positions for lane in lanes])
        stream = Stream(hidden, torch.from_numpy(positions))
        return self.toy.run(Span(first, stop), stream, view).hidden

    def _shallow_step(self, rows):
        hidden = self.toy.embedding(torch.tensor(rows.token_ids))
        places = zip(rows.req_ids, rows.positions, strict=True)
        states = self._span(0, self.exit_layer, hidden, [(i, at, 1) for i, at in places])
        said = ExitSignals(self.head.logits(states), rows.req_ids)
        sure = said.confidence.tolist()
        leaves = [value > self.threshold for value in sure]
        self.book.push(rows, states, said.token_ids.tolist(), sure, leaves)

    def _target_step(self, begins):
        """Shallow layers where nothing was kept, then the deep ones on every row."""
        scheduled = {
            i: self.requests[i].token_ids[begin:] + self.book.drafts(i)
            for i, begin in begins.items()
        }
        states, rows = [], []
        for req_id, token_ids in scheduled.items():
            begin, left = begins[req_id], token_ids
            kept = self.book.kept_rows(req_id, begin, token_ids)
            states.append(self.book.states[kept])
            left = token_ids[len(kept) :]
            if left:
                hidden = self.toy.embedding(torch.tensor(left))
                place = (req_id, begin + len(kept), len(left))
                states.append(self._span(0, self.exit_layer, hidden, [place]))
            rows.append((req_id, begin, len(token_ids)))
            self.saved += len(kept)
        deep = self._span(self.exit_layer, 4, torch.cat(states), rows)
        choices = self.toy.logits(deep).argmax(dim=-1).tolist()
        starts = np.cumsum([0, *(count for _, _, count in rows)]).tolist()
        for (req_id, begin, _), (a, b) in zip(rows, pairwise(starts), strict=True):
            self._settle(req_id, begin, choices[a:b])

    def _settle(self, req_id, begin, choices):
        request, drafts = self.requests[req_id], self.book.drafts(req_id)
        known = len(request.token_ids) - begin
        choices = choices[known - 1 :]
        standing = len(drafts)
        if self.mode == "verify":
            wrong = [i for i, token in enumerate(drafts) if token != choices[i]]
            standing = wrong[0] if wrong else standing
            choices = choices[: standing + 1]
        seen = self.book.settle(req_id, begin, choices)
        if seen and seen.drafted:
            self.seen.append(seen)
        request.token_ids += [*drafts[:standing], choices[standing]]


PROMPTS = [[5, 9, 9, 2, 40, 7], [1, 2, 3], [60, 61, 62, 63, 1, 1, 1, 1, 1]]


def decoder():
    toy = ToyDecoder(num_layers=4)
    for layer in toy.layers[2:]:
        layer.out.weight *= 0.3
        layer.down.weight *= 0.3
    return toy


@pytest.mark.parametrize("cap", [1, 3, 8])
@pytest.mark.parametrize("threshold", [-1.0, 0.05, 1.0])
@torch.no_grad()
def test_a_batch_in_mode_verify_says_what_each_says_alone(threshold, cap):
    served = Host(
        decoder(), PROMPTS, mode="verify", threshold=threshold, cap=cap, max_tokens=16
    )
    alone = Free(ToyLayers(decoder(), range(1, 40)), 2, "verify", 1.0)
    assert served.run() == [alone.generate(p, 16).token_ids for p in PROMPTS]
    assert served.saved > 0


@pytest.mark.parametrize("threshold", [-1.0, 0.02, 0.05, 0.1])
@torch.no_grad()
def test_a_batch_in_mode_exit_says_what_the_published_algorithm_says(threshold):
    cap, max_tokens = 4, 16
    served = Host(
        decoder(), PROMPTS, mode="exit", threshold=threshold, cap=cap, max_tokens=max_tokens
    )
    alone = Free(ToyLayers(decoder(), range(1, 40)), 2, "exit", threshold, cap=cap)
    answers = [alone.generate(p, max_tokens).token_ids for p in PROMPTS]
    # The engine's last token is always the deep layers': a step ends with one.
    assert [a[:-1] for a in served.run()] == [a[:-1] for a in answers]


@torch.no_grad()
def test_the_estimator_is_shown_the_same_as_by_the_published_algorithm():
    settings = {"mode": "exit", "threshold": 0.05}
    served = Host(decoder(), PROMPTS[:1], **settings, cap=99, max_tokens=16)
    served.run()
    alone = Free(ToyLayers(decoder(), range(1, 40)), 2, **settings)
    alone.generate(PROMPTS[0], 16)
    agree = [yes for seen in served.seen for yes in seen.agree]
    sure = [value for seen in served.seen for value in seen.confidence]
    assert len(alone.agree) > 3
    assert agree[: len(alone.agree)] == alone.agree
    assert sure[: len(alone.agree)] == pytest.approx(alone.confidence, abs=1e-5)
