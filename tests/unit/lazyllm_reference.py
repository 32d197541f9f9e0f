"""LazyLLM for one sequence, token by token and in dictionaries: slow and plain to read.

Written from the paper (arXiv 2407.14057, section 4) and from what `vllm_accel.lazyllm` says
it does differently; it shares no code with it.
"""

import math
from itertools import pairwise

import torch


class Reference:
    def __init__(
        self,
        toy,
        *,
        points,
        keep,
        size,
        sink=0,
        recent=1,
        budget=0,
        observe=1,
        spread=0,
        every=1,
        ahead=True,
        fills=1,
    ):
        self.toy, self.size, self.sink, self.recent = toy, size, sink, recent
        self.observe, self.every, self.ahead = observe, every, ahead
        self.spread, self.fills = spread, fills
        edges = [0, *points, toy.num_layers]
        self.spans = [range(a, b) for a, b in pairwise(edges)]
        self.keep, self.budget = [1.0, *keep], budget
        self.keys = [{} for _ in toy.layers]  # layer -> {position: [kv_heads, head_dim]}
        self.values = [{} for _ in toy.layers]
        self.waiting = {}  # position -> (span, hidden)
        self.scores = {}  # span -> {page: importance}
        self.wanted = []  # (span, page) to run in the next step
        self.prompt_len = self.length = self.revived = 0

    def prefill(self, ids, most=None):
        """Logits of the last token; the prompt in pieces of `most` tokens."""
        self.prompt_len, most = len(ids), most or len(ids)
        for first in range(0, len(ids), most):
            logits = self.piece(ids[first : first + most])
        return logits

    def piece(self, ids, dense=False):
        first, self.length = self.length, self.length + len(ids)
        rows = {
            first + i: self.toy.embedding(torch.tensor(token))
            for i, token in enumerate(ids)
        }
        pages = sorted({i // self.size for i in rows})
        edges = {first // self.size} if first % self.size else set()
        judging = range(max(self.length - self.observe, first), self.length)
        edges |= {i // self.size for i in judging}
        for k in range(len(self.spans)):
            prunes = k + 1 < len(self.spans) and not dense
            judges = sorted(rows)[-self.observe :]
            rows = self._run_span(k, rows, judges if prunes and not self.ahead else [])
            if prunes and self.ahead:
                self._look_ahead(k, rows, judges)
            if prunes:
                running = sorted({i // self.size for i in rows})
                kept = self._best(k, running, self._count(k + 1, pages, edges), edges)
                for i in [i for i in rows if i // self.size not in kept]:
                    self.waiting[i] = (k + 1, rows.pop(i))
        if self.length == self.prompt_len:
            self._choose()
        return self._logits(rows[self.length - 1])

    def decode(self, token):
        position, self.length = self.length, self.length + 1
        row = self.toy.embedding(torch.tensor(token))
        for k in range(len(self.spans)):
            back = {
                i: self.waiting.pop(i)
                for span, page in self.wanted
                if span == k
                for i in range(page * self.size, (page + 1) * self.size)
            }
            assert all(span == k for span, _ in back.values())
            self.revived += len(back) // self.size
            rows = {i: hidden for i, (_, hidden) in back.items()} | {position: row}
            rows = self._run_span(k, rows, judges=[position])
            row = rows.pop(position)
            if k + 1 < len(self.spans):
                self.waiting |= {i: (k + 1, hidden) for i, hidden in rows.items()}
        self.wanted = []
        if (position - self.prompt_len + 1) % self.every == 0:
            self._choose()
        return self._logits(row)

    def _choose(self):
        """The next step's pages, from the scores of this one."""
        chosen, found = set(range(-(-self.prompt_len // self.size))), []
        for k in range(1, len(self.spans)):
            judged = sorted(page for page in chosen if page in self.scores[k - 1])
            last = range(max(self.prompt_len - self.observe, 0), self.prompt_len)
            edges = {i // self.size for i in last}
            count = self._count(k, range(-(-self.prompt_len // self.size)), edges)
            chosen = self._best(k - 1, judged, count, edges)
            for page in chosen:
                if page * self.size not in self.keys[self.spans[k][0]]:
                    found.append((-self.scores[k - 1][page], k, page))
        self.wanted = [(k, page) for _, k, page in sorted(found)[: self.budget]]

    def _always(self, page, edges=()):
        first, stop = page * self.size, (page + 1) * self.size
        is_end = stop > self.prompt_len - self.recent
        return first < self.sink or is_end or page in edges

    def _count(self, k, pages, edges=()):
        always = sum(self._always(page, edges) for page in pages)
        count = always + math.ceil(round(self.keep[k] * (len(pages) - always), 6))
        while not self._fills_pages(count, pages):
            count += 1
        return count

    def _fills_pages(self, count, tokens):
        """Whether so many, the first behind what is there, end where the prompt does."""
        inside = [token for token in tokens if token < self.prompt_len]
        if self.fills == 1 or not inside:
            return True
        head = min(-inside[0] % self.fills, len(inside))
        left = count - (len(tokens) - len(inside)) - head
        if head == len(inside):
            return left == 0
        return left > 0 and (inside[-1] + 1 - left) % self.fills == 0

    def _best(self, k, pages, count, edges=()):
        score = self.scores[k]
        order = sorted(pages, key=lambda p: (not self._always(p, edges), -score[p], p))
        return set(order[:count])

    def _run_span(self, k, rows, judges):
        for layer in self.spans[k]:
            block = self.toy.layers[layer]
            queries = {}
            for i, hidden in rows.items():
                assert i not in self.keys[layer], f"{i} runs layer {layer} twice"
                q, key, value = block.project(hidden[None], torch.tensor([i]))
                queries[i], self.keys[layer][i], self.values[layer][i] = (
                    q[0],
                    key[0],
                    value[0],
                )
            for i, hidden in rows.items():
                out = self._attend(layer, i, queries[i])[0]
                rows[i] = block.finish(hidden[None], out.flatten()[None])[0]
        if judges and k + 1 < len(self.spans):
            self.scores[k] = self._judged(self.spans[k][-1], judges, queries)
        return rows

    def _look_ahead(self, k, rows, judges):
        """Scores of the layer to come, as if all rows ran it; nothing of it stays."""
        layer, queries = self.spans[k + 1][0], {}
        before = dict(self.keys[layer]), dict(self.values[layer])
        for i, hidden in rows.items():
            position = torch.tensor([i])
            q, key, value = self.toy.layers[layer].project(hidden[None], position)
            queries[i], self.keys[layer][i], self.values[layer][i] = q[0], key[0], value[0]
        found = self._judged(layer, judges, queries)
        self.scores[k] = self.scores.get(k, {}) | found
        self.keys[layer], self.values[layer] = before

    def _judged(self, layer, judges, queries):
        paid = [self._attend(layer, judge, queries[judge])[1] for judge in judges]
        seen = paid[-1]  # of the last token, which sees all the others do
        weights = [sum(p.get(j, 0.0) for p in paid) / len(paid) for j in seen]
        reach = self.spread
        most = [max(weights[max(i - reach, 0) : i + reach + 1]) for i in range(len(seen))]
        return self._by_page(dict(zip(seen, most, strict=True)))

    def _attend(self, layer, i, query):
        seen = sorted(j for j in self.keys[layer] if j <= i)
        keys = torch.stack([self.keys[layer][j] for j in seen])
        values = torch.stack([self.values[layer][j] for j in seen])
        outs, mean = [], torch.zeros(len(seen), dtype=query.dtype)
        for head, q in enumerate(query):
            kv = head * keys.shape[1] // len(query)
            weights = (keys[:, kv] @ q * self.toy.scale).softmax(dim=0)
            outs.append(weights @ values[:, kv])
            mean += weights / len(query)
        return torch.stack(outs), dict(zip(seen, mean.tolist(), strict=True))

    def _by_page(self, weights):
        pages = {}
        for j, weight in weights.items():
            pages.setdefault(j // self.size, []).append(weight)
        return {page: sum(seen) / len(seen) for page, seen in pages.items()}

    def _logits(self, hidden):
        return self.toy.logits(hidden[None])[0]
