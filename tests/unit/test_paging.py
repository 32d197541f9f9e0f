from collections import Counter, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import PoolBooks

from vllm_accel.paging import (
    NULL_BLOCK,
    PageChange,
    PageLedger,
    PageReport,
    WorkerPages,
    count_filling_pages,
    moved_together,
    num_pages,
    slots,
    without_nulls,
)

GROUPS = [[0], [1], [2, 3]]


def test_distinct_tokens_have_distinct_slots():
    found = slots([7, 2, 5], np.arange(12), 4)
    assert found.tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20, 21, 22, 23]


def test_a_token_in_a_null_page_has_no_slot():
    with pytest.raises(AssertionError, match="null page"):
        slots([7, NULL_BLOCK, 5], np.array([5]), 4)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_pages_are_as_many_as_it_takes(tokens):
    assert (num_pages(tokens, 4) - 1) * 4 < tokens <= num_pages(tokens, 4) * 4


def test_null_pages_are_left_out_and_lengths_recounted():
    table = torch.tensor([[3, 0, 0, 9, 4], [5, 6, 8, 0, 0], [0, 0, 0, 0, 0]])
    lens = torch.tensor([17, 9, 0])
    table, lens = without_nulls(table.int(), lens.int(), 4)
    assert table.tolist() == [[3, 9, 4, 0, 0], [5, 6, 8, 0, 0], [0, 0, 0, 0, 0]]
    assert lens.tolist() == [9, 9, 0]
    assert table.dtype == lens.dtype == torch.int32


def test_what_lies_behind_a_requests_last_page_is_not_read():
    table, lens = without_nulls(torch.tensor([[3, 0, 7, 8]]).int(), torch.tensor([5]), 4)
    assert table.tolist() == [[3, 0, 0, 0]]
    assert lens.tolist() == [1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_tokens_moved_together_leave_no_page_half_empty(lengths, data):
    places, first = [], 0
    for length in lengths:
        stop = first + length
        wanted = data.draw(st.integers(1, length))
        count = count_filling_pages(wanted, first, stop, 4)
        assert wanted <= count <= length
        moved = moved_together(count, first, stop, 4).tolist()
        assert len(moved) == count
        places += moved
        first = stop
    assert places == sorted(set(places))
    assert places[-1] == first - 1
    filled = Counter(place // 4 for place in places)
    last = (first - 1) // 4
    assert all(count == 4 for page, count in filled.items() if page != last)
    assert filled[last] == first - 4 * last


@pytest.mark.parametrize(
    ("count", "first", "stop", "expected"),
    [
        (3, 0, 16, 4),
        (4, 0, 16, 4),
        (1, 0, 15, 3),
        (4, 0, 15, 7),
        (1, 6, 16, 6),
        (3, 6, 15, 5),
    ],
)
def test_no_more_tokens_are_kept_than_that_takes(count, first, stop, expected):
    assert count_filling_pages(count, first, stop, 4) == expected


def start(ledger, books, pages=6):
    books.grow("a", pages)
    ledger.answer(["a"], ["a"], reserve=0)


def report(step, **change):
    return PageReport(step, {"a": {2: PageChange(**change)}})


def test_a_page_is_one_block_of_every_group_of_its_span():
    books = PoolBooks(40, 4)
    ledger = PageLedger(books, GROUPS)
    start(ledger, books)
    ledger.settle(report(1, dropped=(3,)))
    assert [books.block_at("a", group, 3) for group in (2, 3)] == [NULL_BLOCK] * 2
    ledger.settle(report(1, wanted=(3,)))
    answer = ledger.answer([], ["a"], reserve=0)
    blocks = tuple(books.block_at("a", group, 3) for group in (2, 3))
    assert answer.granted == {"a": {2: {3: blocks}}}


def test_a_grant_leaves_the_reserve_or_is_declined_whole():
    books = PoolBooks(4 * 6 + 1, 4)
    ledger = PageLedger(books, GROUPS)
    start(ledger, books)
    ledger.settle(report(1, dropped=(2, 3), wanted=()))
    ledger.settle(report(1, wanted=(2, 3)))
    answer = ledger.answer([], ["a"], reserve=1)
    assert list(answer.granted["a"][2]) == [2]
    assert answer.declined == (("a", 2, 3),)
    assert (ledger.pages_granted, ledger.pages_declined) == (1, 1)
    assert books.num_free() == 2


def test_wants_of_a_request_that_is_not_scheduled_wait():
    books = PoolBooks(40, 4)
    ledger = PageLedger(books, GROUPS)
    start(ledger, books)
    ledger.settle(report(1, dropped=(3,)))
    ledger.settle(report(1, wanted=(3,)))
    assert ledger.answer([], [], reserve=0).granted == {}
    assert ledger.answer([], ["a"], reserve=0).granted["a"].keys() == {2}


def test_a_report_from_before_a_preemption_is_void():
    books = PoolBooks(40, 4)
    ledger = PageLedger(books, GROUPS)
    start(ledger, books)
    books.release("a")
    ledger.free("a")
    ledger.settle(report(1, dropped=(3,)))
    start(ledger, books)
    ledger.settle(report(1, dropped=(3,), wanted=(4,)))
    assert NULL_BLOCK not in books.rows["a"][2]
    assert ledger.answer([], ["a"], reserve=0).granted == {}
    ledger.settle(report(2, dropped=(3,)))
    assert books.block_at("a", 2, 3) == NULL_BLOCK


def test_a_worker_tells_a_change_once():
    pages = WorkerPages(GROUPS)
    pages.start("a", [[1, 2], [3, 4], [5, 6], [7, 8]])
    cells = pages.drop("a", 2, [0])
    assert [(cell.group, cell.page, cell.block_id) for cell in cells] == [
        (2, 0, NULL_BLOCK),
        (3, 0, NULL_BLOCK),
    ]
    pages.want("a", 2, 0)
    assert pages.report().changes == {"a": {2: PageChange((0,), (0,))}}
    assert pages.report().changes == {}
    assert pages.asked == {("a", 2, 0)}


class World:
    """Scheduler and worker with steps between them, and what the worker wrote where."""

    def __init__(self, draw):
        self.draw = draw
        self.books = PoolBooks(60, 4)
        self.ledger = PageLedger(self.books, GROUPS)
        self.pages = WorkerPages(GROUPS)
        self.queue, self.reports = deque(), deque()
        self.live, self.waiting, self.gone = {}, {}, []
        self.memory, self.rows, self.lives = {}, {}, 0

    def admit(self):
        if len(self.live) + len(self.waiting) < 4:
            self.lives += 1
            req_id = self.draw(st.sampled_from("abcd"))
            if req_id not in self.live and req_id not in self.waiting:
                self.waiting[req_id] = self.draw(st.integers(1, 6))

    def lose(self, again):
        if self.live:
            req_id = self.draw(st.sampled_from(sorted(self.live)))
            self.books.release(req_id)
            self.ledger.free(req_id)
            self.gone.append(req_id)
            pages = self.live.pop(req_id)
            if again:
                self.waiting[req_id] = pages

    def schedule(self):
        while len(self.queue) + len(self.reports) >= 2:
            self.run() if self.queue else self.update()
        rows, started = {}, []
        for req_id in [*self.live, *self.waiting]:
            pages = self.live.get(req_id, self.waiting.get(req_id))
            if req_id in self.live:
                pages += self.draw(st.integers(0, 1))
            if self.draw(st.booleans()) and (new := self.books.grow(req_id, pages)):
                rows[req_id] = new
                if self.waiting.pop(req_id, None):
                    started.append(req_id)
                self.live[req_id] = pages
            elif req_id not in self.live:
                self.books.rows.pop(req_id, None)
        answer = self.ledger.answer(started, rows, self.draw(st.integers(0, 20)))
        self.queue.append((self.gone, started, rows, answer))
        self.gone = []

    def run(self):
        if not self.queue:
            return
        gone, started, rows, answer = self.queue.popleft()
        for req_id in gone:
            self.pages.forget(req_id)
        for req_id, new in rows.items():
            if req_id in started:
                self.lives += 1
                self.rows[req_id] = (self.lives, [[] for _ in range(4)])
                self.pages.start(req_id, self.rows[req_id][1])
            life, mine = self.rows[req_id]
            for group, ids in enumerate(new):
                first = len(mine[group])
                mine[group].extend(ids)
                for page, block in enumerate(ids, first):
                    self.memory[block] = (life, group, page)
        for cell in self.pages.take(answer):
            self.memory[cell.block_id] = (self.rows[cell.req_id][0], cell.group, cell.page)
        for req_id in rows:
            self.read(req_id)
            self.choose(req_id)
        self.reports.append(self.pages.report())

    def read(self, req_id):
        life, mine = self.rows[req_id]
        for group, row in enumerate(mine):
            for page, block in enumerate(row):
                if block != NULL_BLOCK:
                    assert self.memory[block] == (life, group, page)

    def choose(self, req_id):
        for span in (1, 2):
            row = self.pages.row(req_id, span)
            for page in range(len(row) - 1):
                if not self.draw(st.booleans()):
                    continue
                if row[page] != NULL_BLOCK:
                    self.pages.drop(req_id, span, [page])
                elif (req_id, span, page) not in self.pages.asked:
                    self.pages.want(req_id, span, page)

    def update(self):
        if self.reports:
            self.ledger.settle(self.reports.popleft())
        assert max(self.books.owners().values(), default=1) == 1

    def end(self):
        while self.live:
            self.lose(again=False)
        self.schedule()
        while self.queue:
            self.run()
        while self.reports:
            self.update()
        assert self.books.num_free() == 59
        assert not self.pages.asked


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_lives_return_every_page_and_nobody_reads_anothers(data):
    world = World(data.draw)
    acts = {
        "admit": world.admit,
        "schedule": world.schedule,
        "run": world.run,
        "update": world.update,
        "finish": lambda: world.lose(again=False),
        "preempt": lambda: world.lose(again=True),
    }
    for name in data.draw(
        st.lists(st.sampled_from(sorted(acts)), min_size=10, max_size=40)
    ):
        acts[name]()
    world.waiting.clear()
    world.end()
