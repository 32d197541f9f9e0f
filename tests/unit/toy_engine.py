"""A scheduler and a worker around ToyDecoder: what the host does, without an engine."""

from collections import Counter

import numpy as np
import torch

from vllm_accel.lazyllm.aux_cache import AuxCache
from vllm_accel.lazyllm.importance import attention_paid
from vllm_accel.lazyllm.pruner import Pruner
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import (
    NULL_BLOCK,
    PageLedger,
    WorkerPages,
    num_pages,
    slots,
    without_nulls,
)
from vllm_accel.spans import Span, Stream, View, group_layers, view_of


class PoolBooks:
    """Rows and a pool, as vLLM's managers and BlockPool: last freed, first used."""

    def __init__(self, num_blocks, num_groups):
        self.free_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self.num_groups = num_groups
        self.rows = {}

    def num_free(self):
        return len(self.free_ids)

    def block_at(self, req_id, group, page):
        return self.rows[req_id][group][page]

    def give_back(self, req_id, group, page):
        row = self.rows[req_id][group]
        assert row[page] != NULL_BLOCK
        self.free_ids.append(row[page])
        row[page] = NULL_BLOCK

    def take(self, req_id, group, page):
        row = self.rows[req_id][group]
        assert row[page] == NULL_BLOCK
        row[page] = self.free_ids.pop()
        return row[page]

    def grow(self, req_id, pages):
        """New block ids per group, or None if the pool is too short for all of them."""
        rows = self.rows.setdefault(req_id, [[] for _ in range(self.num_groups)])
        more = max(pages - len(rows[0]), 0)
        if more * self.num_groups > self.num_free():
            return None
        new = [[self.free_ids.pop() for _ in range(more)] for _ in rows]
        for row, ids in zip(rows, new, strict=True):
            row.extend(ids)
        return new

    def release(self, req_id):
        for row in self.rows.pop(req_id, ()):
            self.free_ids += [block for block in row if block != NULL_BLOCK]

    def owners(self):
        """{block id: how often it stands in a row}"""
        rows = (row for rows in self.rows.values() for row in rows)
        return Counter(block for row in rows for block in row if block != NULL_BLOCK)


class ToyEngine:
    """Steps of several requests; every page that is given away is wiped."""

    def __init__(self, toy, config, reserve=0):
        self.toy, self.reserve, self.observe = toy, reserve, config.observe
        self.size = toy.block_size
        schedule = Schedule.of(config, num_layers=toy.num_layers, block_size=self.size)
        self.spans = schedule.spans
        layers = [group for groups in group_layers(self.spans) for group in groups]
        self.group_of = {layer: g for g, group in enumerate(layers) for layer in group}
        self.groups = [
            sorted({self.group_of[layer] for layer in range(span.first, span.stop)})
            for span in self.spans
        ]
        num_blocks, hidden = toy.kv_cache.shape[2], toy.embedding.weight.shape[1]
        self.books = PoolBooks(num_blocks, len(layers))
        self.ledger = PageLedger(self.books, self.groups)
        self.pages = WorkerPages(self.groups)
        store = torch.full((64, 4, hidden), torch.nan, dtype=toy.embedding.weight.dtype)
        aux = AuxCache(store) if config.revives else None
        self.pruner = Pruner(config, schedule, aux)
        self.rows, self.tokens, self.computed, self.aux_slots = {}, {}, {}, {}
        self.started, self.steps_in_spans = [], 0
        self.free_aux = list(range(256))

    def add(self, req_id, prompt, keep=None, cached=None):
        """Takes a request; `cached`: (another's id, tokens of it that are the same)."""
        self.tokens[req_id] = list(prompt)
        source, self.computed[req_id] = cached or (None, 0)
        self._start(req_id, len(prompt), source, keep)

    def _start(self, req_id, prompt_len, source=None, keep=None):
        shared = [
            row[: self.computed[req_id] // self.size]
            for row in self.rows.get(source, [[]] * self.books.num_groups)
        ]
        self.books.rows[req_id] = [list(row) for row in shared]
        self.rows[req_id] = [list(row) for row in shared]
        self.started.append(req_id)
        self.pages.start(req_id, self.rows[req_id])
        room = self.pruner.schedule.most_parked(prompt_len)
        taken = [self.free_aux.pop() for _ in range(room)]
        self.aux_slots[req_id] = taken
        self.pruner.admit(
            req_id,
            prompt_len,
            num_cached_tokens=self.computed[req_id],
            keep=keep,
            aux_slots=np.array(taken, int),
        )

    def end(self, req_id):
        """Finish and abort."""
        self.books.release(req_id)
        self.ledger.free(req_id)
        self.pages.forget(req_id)
        self.pruner.forget(req_id)
        self.free_aux += self.aux_slots.pop(req_id)
        self.wipe()

    def preempt(self, req_id, prompt_len):
        """Takes everything away; the next step starts again from the first token."""
        self.end(req_id)
        self.computed[req_id] = 0
        self._start(req_id, prompt_len)

    def generate(self, req_ids, steps, most=None):
        """Runs steps of requests, in pieces of `most` tokens; adds their greedy tokens."""
        for _ in range(steps):
            for req_id, logits in self.step(req_ids, most).items():
                if self.computed[req_id] == len(self.tokens[req_id]):
                    self.tokens[req_id].append(int(logits.argmax()))

    def step(self, req_ids, most=None):
        """Runs what is not computed yet; gives logits of every last row."""
        pieces = {}
        for req_id in req_ids:
            first, stop = self.computed[req_id], len(self.tokens[req_id])
            pieces[req_id] = (first, min(stop, first + (most or stop)))
            new = self.books.grow(req_id, num_pages(pieces[req_id][1], self.size))
            for row, ids in zip(self.rows[req_id], new, strict=True):
                row.extend(ids)
            self.computed[req_id] = pieces[req_id][1]
        answer = self.ledger.answer(self.started, pieces, self.reserve)
        self.started = []
        self.pages.take(answer)
        revived = [
            (req_id, span, page)
            for req_id, spans in answer.granted.items()
            for span, pages in spans.items()
            for page in pages
        ]
        step = self.pruner.begin(pieces, revived)
        run = self._run_spans if step.needs_spans else self._run_whole
        hidden = run(step, pieces)
        for req_id, spans in step.dropped.items():
            for span, pages in spans.items():
                self.pages.drop(req_id, span, pages)
        for wanted in step.wants(self.pages.asked):
            self.pages.want(*wanted)
        self.ledger.settle(self.pages.report())
        self.wipe()
        ends = np.cumsum([stop - first for first, stop in pieces.values()]) - 1
        last = torch.from_numpy(np.flatnonzero(np.isin(step.origin, ends)))
        return dict(zip(pieces, self.toy.logits(hidden[last]), strict=True))

    def wipe(self):
        self.toy.kv_cache[:, :, self.books.free_ids] = torch.nan

    def _embed(self, pieces):
        ids = [t for req_id, p in pieces.items() for t in self.tokens[req_id][slice(*p)]]
        positions = np.concatenate([np.arange(*piece) for piece in pieces.values()])
        return self.toy.embed(torch.tensor(ids), torch.from_numpy(positions))

    def _run_spans(self, step, pieces):
        self.steps_in_spans += 1
        stream = self._embed(pieces)
        for k, span in enumerate(self.spans):
            stream = step.enter(k, stream)
            views = self._views(k, step.lanes(k))
            stream, importance = self._layers(span, stream, views, step.scored(k))
            importance |= self._ahead(k, step, stream)
            stream = step.leave(k, stream, importance)
        return stream.hidden

    def _views(self, k, lanes):
        return {
            group: view_of(lanes, lambda r, group=group: self.rows[r][group], self.size)
            for group in self.groups[k]
        }

    def _run_whole(self, step, pieces):
        """Nothing but other metadata per group, as the host's builder makes it."""
        stream = self._embed(pieces)
        for k, span in enumerate(self.spans):
            views = {group: self._whole_view(pieces, group) for group in self.groups[k]}
            stream, importance = self._layers(span, stream, views, step.scored(k))
            step.note(k, importance)
        return stream.hidden

    def _whole_view(self, pieces, group):
        width = max(len(self.rows[req_id][group]) for req_id in pieces)
        table = torch.zeros(len(pieces), width, dtype=torch.int32)
        places = []
        for i, (req_id, piece) in enumerate(pieces.items()):
            row = self.rows[req_id][group]
            table[i, : len(row)] = torch.tensor(row)
            places.append(slots(row, np.arange(*piece), self.size))
        lens = torch.tensor([stop for _, stop in pieces.values()], dtype=torch.int32)
        table, lens = without_nulls(table, lens, self.size)
        starts = np.cumsum([0, *(stop - first for first, stop in pieces.values())])
        return View(
            torch.from_numpy(starts), lens, table, torch.from_numpy(np.hstack(places))
        )

    def _ahead(self, k, step, stream):
        lanes, asked = step.ahead(k)
        if not asked:
            return {}
        layer, found = self.spans[k + 1].first, {}
        view = view_of(lanes, lambda r: self.rows[r][self.group_of[layer]], self.size)
        rows = stream.take(torch.arange(sum(map(len, lanes))))
        self.toy.attend(layer, rows, view, self._scorer(layer, asked, found))
        return found

    def _layers(self, span, stream: Stream, views, scored):
        found = {}
        score = self._scorer(span.last, scored, found)
        for layer in range(span.first, span.stop):
            view = views[self.group_of[layer]]
            stream = self.toy.run(Span(layer, layer + 1), stream, view, score)
        return stream, found

    def _scorer(self, asked, scored, found):
        def score(layer, query, view):
            for req_id, lane in scored.items() if layer == asked else ():
                first, stop = view.query_start_loc[lane : lane + 2].tolist()
                rows = query[max(first, stop - self.observe) : stop]
                keys = self.toy.keys(layer, view, lane)
                found[req_id] = attention_paid(rows, keys, self.toy.scale)

        return score
