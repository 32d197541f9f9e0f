"""Drives steps over spans: what flows on, what is parked, what is brought back.

A worker has one `Pruner`. For every step it makes a `Step`; where `needs_spans`, the host
runs span after span between `enter` and `leave`, else the whole model at once and `note`s
what attention paid. Both leave nothing to the host but layers, metadata and pages.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_accel.lazyllm.aux_cache import AuxCache
from vllm_accel.lazyllm.config import Keep, LazyConfig
from vllm_accel.lazyllm.flows import Flow, Revival
from vllm_accel.lazyllm.importance import scorer
from vllm_accel.lazyllm.prompt import PrunedPrompt
from vllm_accel.lazyllm.schedule import Schedule
from vllm_accel.paging import Wanted
from vllm_accel.spans import Lane, Stream


@dataclass(slots=True)
class PruneCounts:
    """What happened since the counts were last taken."""

    rows: list[int]
    """Per span, token rows that ran it."""
    pages_parked: int = 0
    """Pages of prompts left out of some span, with their tokens parked or not."""
    pages_revived: int = 0
    """Pages run through a span they had stopped before."""
    prompts_pruned: int = 0
    prompts_inert: int = 0
    """Too short, wholly cached or asked to be kept as they are."""


class Pruner:
    """What a worker knows of all its prompts.

    Args:
        config: of the engine.
        schedule: the config's, for its model.
        aux: where pruned tokens wait; None where they never come back.
    """

    def __init__(
        self, config: LazyConfig, schedule: Schedule, aux: AuxCache | None
    ) -> None:
        assert config.revives == (aux is not None), "an Aux Cache is for reviving"
        self.config = config
        self.schedule = schedule
        self.aux = aux
        self.score = scorer(config.choose, config.pooling, config.spread)
        """See `importance.Scorer`."""
        self.latest: PrunedPrompt | None = None
        """The prompt admitted last of those that are pruned, for people to look at."""
        self._prompts: dict[str, PrunedPrompt] = {}
        self._judged_at: dict[str, tuple[int, int]] = {}
        """{req_id: (step, running number)}"""
        self._turns = count(1)
        self._steps = 0
        self.counts = PruneCounts([0] * len(schedule.spans))

    def admit(
        self,
        req_id: str,
        num_prompt_tokens: int,
        *,
        num_cached_tokens: int = 0,
        keep: Keep | None = None,
        aux_slots: NDArray[np.int64] | None = None,
    ) -> None:
        """Takes a request that is new or resumed.

        Args:
            num_prompt_tokens: of its prompt.
            num_cached_tokens: found in the prefix cache.
            keep: what it asks for instead of the config's.
            aux_slots: of the Aux Cache, `Schedule.most_parked` of them at least.
        """
        self.forget(req_id)
        schedule = self.schedule if keep is None else self.schedule.with_keep(keep)
        if not schedule.prunes(num_prompt_tokens) or num_cached_tokens >= num_prompt_tokens:
            self.counts.prompts_inert += 1
            return
        self.latest = PrunedPrompt(schedule, num_prompt_tokens, num_cached_tokens)
        self._prompts[req_id] = self.latest
        self.counts.prompts_pruned += 1
        if self.aux is not None:
            assert aux_slots is not None, f"{req_id} has no room in the Aux Cache"
            self.aux.admit(req_id, num_prompt_tokens, aux_slots)

    def forget(self, req_id: str) -> None:
        """Drops a request that finished, was preempted or aborted; unknown ones pass."""
        self._prompts.pop(req_id, None)
        self._judged_at.pop(req_id, None)
        if self.aux is not None:
            self.aux.forget(req_id)

    def prompt(self, req_id: str) -> PrunedPrompt | None:
        """The state of a request; None if it runs dense."""
        return self._prompts.get(req_id)

    def begin(
        self,
        scheduled: Mapping[str, tuple[int, int]],
        revived: Iterable[Wanted] = (),
    ) -> "Step":
        """Starts a step.

        Args:
            scheduled: per request in batch order, the tokens [first, stop) it runs.
            revived: pages granted with this step, to be run in it.
        """
        self._steps += 1
        flows = [
            Flow(req_id, self._prompts.get(req_id), piece, np.arange(*piece))
            for req_id, piece in scheduled.items()
        ]
        return Step(self, flows, revived)

    def judge(self, prefilling: set[str], decoding: Iterable[str]) -> set[str]:
        """Requests whose pages are chosen in this step: who prefills, and whose turn it is.

        Of those that decode as many as could each have one page back in a step, each not
        before `revive_every` steps: scoring costs time, and so does a page.
        """
        latest = self._steps - self.config.revive_every
        since = {req_id: self._judged_at.get(req_id, (latest, 0)) for req_id in decoding}
        due = [req_id for req_id, (step, _) in since.items() if step <= latest]
        turn = sorted(due, key=since.__getitem__)[: self.config.revive_pages]
        for req_id in (*sorted(prefilling), *turn):  # in the same order on every rank
            self._judged_at[req_id] = (self._steps, next(self._turns))
        return prefilling.union(turn)

    def take_counts(self) -> PruneCounts:
        """The counts so far; they start again."""
        counts, self.counts = self.counts, PruneCounts([0] * len(self.schedule.spans))
        return counts


class Step:
    """One step on its way through the spans: rows of requests first, revived ones after."""

    def __init__(
        self, pruner: Pruner, flows: list[Flow], revived: Iterable[Wanted]
    ) -> None:
        self._pruner = pruner
        self._spans = pruner.schedule.spans
        self._block_size = pruner.schedule.block_size
        self._flows = flows
        self._origin = np.arange(sum(len(flow.positions) for flow in flows))
        self._revivals = [self._revival(*wanted) for wanted in revived]
        self.dropped: dict[str, dict[int, list[int]]] = {}
        """{req_id: {span: pages}} pages this step found out to be without use."""
        for flow in flows:
            if flow.prompt is not None:
                flow.prompt.start(flow.positions)
        self.num_drafts = {
            flow.req_id: len(flow.positions) - 1 for flow in flows if flow.may_revive
        }
        """{req_id: rows behind the token given last} of requests that decode."""
        self._judged = {flow.req_id for flow in flows if flow.prefills}
        if pruner.aux is not None:
            self._judged = pruner.judge(self._judged, self.num_drafts)

    @property
    def needs_spans(self) -> bool:
        """Whether rows differ from span to span."""
        return bool(self._revivals) or any(flow.prefills for flow in self._flows)

    @property
    def parks(self) -> bool:
        """Whether hidden states of rows that stop are kept."""
        return self._pruner.aux is not None

    @property
    def origin(self) -> NDArray[np.int64]:
        """[num_rows] which of the step's rows the ones still flowing are."""
        return self._origin

    def lanes(self, span: int) -> list[Lane]:
        """What runs a span, in the order of its rows."""
        main = [flow.lane(span, self._block_size) for flow in self._flows]
        return main + [revival.lane() for revival in self._in(span)]

    def scored(self, span: int) -> dict[str, int]:
        """{req_id: index of its lane} of the lanes whose last row is to be scored.

        By the attention it pays in the last layer of a span.
        """
        if span == len(self._spans) - 1:
            return {}
        return {
            flow.req_id: i
            for i, flow in enumerate(self._flows)
            if flow.req_id in self._judged and not self._asks_ahead(flow)
        }

    def ahead(self, span: int) -> tuple[list[Lane], dict[str, int]]:
        """Who is to be judged by the span to come, before its first layer is run.

        Returns:
            Lanes of the requests' rows in the span after `span`, nothing pruned, and
            {req_id: index of its lane} of those whose last row is to be scored there.
        """
        asked = {
            flow.req_id: i for i, flow in enumerate(self._flows) if self._asks_ahead(flow)
        }
        if not asked or span == len(self._spans) - 1:
            return [], {}
        lanes = [flow.lane_ahead(span, self._block_size) for flow in self._flows]
        return lanes, asked

    def _asks_ahead(self, flow: Flow) -> bool:
        return self._pruner.schedule.look_ahead and flow.prefills

    def enter(self, span: int, stream: Stream) -> Stream:
        """The rows that flow, and behind them those revived for this span."""
        layer = self._spans[span].first
        aux = self._pruner.aux
        for revival in self._in(span):
            assert aux is not None, "revived without an Aux Cache"
            rows = aux.revive(revival.req_id, revival.positions, layer)
            positions = torch.from_numpy(revival.positions).to(stream.positions.device)
            stream = Stream(
                torch.cat([stream.hidden, rows.to(stream.hidden)]),
                torch.cat([stream.positions, positions]),
            )
        return stream

    def note(self, span: int, importance: Mapping[str, Tensor]) -> None:
        """Takes in what the last rows paid attention to.

        Args:
            importance: {req_id: [seq_len] float32} of the lanes that are `scored`, by
                this span or `ahead` of the next.
        """
        for flow in self._flows:
            if flow.prompt is not None and flow.req_id in importance:
                ahead = self._asks_ahead(flow)
                units = flow.units_ahead(span) if ahead else flow.units(span)
                size = flow.prompt.schedule.unit
                scores = self._pruner.score(importance[flow.req_id], size)
                flow.prompt.note(span, units, scores)

    def leave(
        self, span: int, stream: Stream, importance: Mapping[str, Tensor] | None = None
    ) -> Stream:
        """The rows that flow on, after a span has run; the others are parked.

        Args:
            importance: see `note`.
        """
        self.note(span, importance or {})
        self._pruner.counts.rows[span] += len(stream)
        first, rows = 0, []
        for flow in self._flows:
            stop = first + len(flow.positions)
            kept = self._leave(span, flow, stream.hidden[first:stop])
            rows.append(first + np.flatnonzero(kept))
            first = stop
        for revival in self._in(span):
            stop = first + len(revival.positions)
            revival.prompt.run(span, revival.positions)
            self._park(span, revival.req_id, revival.positions, stream.hidden[first:stop])
            self._pruner.counts.pages_revived += 1
            first = stop
        flowing = np.concatenate(rows)
        if len(flowing) == len(stream):
            return stream
        self._origin = self._origin[flowing]
        return stream.take(torch.from_numpy(flowing).to(stream.positions.device))

    def wants(self, asked: Collection[Wanted] = ()) -> list[Wanted]:
        """Pages to ask for once the step has run, the most important first.

        Args:
            asked: those asked for and not answered; they count against the budget.
        """
        if self._pruner.aux is None:
            return []
        found = [
            (-missing.importance, missing.span, order, missing.page, flow.req_id)
            for order, flow in enumerate(self._flows)
            if flow.prompt is not None and flow.req_id in self._judged
            for missing in flow.prompt.missing()
            if (flow.req_id, missing.span, missing.page) not in asked
        ]
        running = {flow.req_id for flow in self._flows}
        waiting = sum(req_id in running for req_id, _, _ in asked)
        room = max(self._pruner.config.revive_pages - waiting, 0)
        return [(req_id, span, page) for _, span, _, page, req_id in sorted(found)[:room]]

    def _revival(self, req_id: str, span: int, page: int) -> Revival:
        prompt = self._pruner.prompt(req_id)
        assert prompt is not None, f"{req_id} is not pruned"
        prompt.bring_back(span, page)
        return Revival(req_id, prompt, span, page)

    def _in(self, span: int) -> list[Revival]:
        return [revival for revival in self._revivals if revival.span == span]

    def _leave(self, span: int, flow: Flow, hidden: Tensor) -> NDArray[np.bool_]:
        """[num_rows] which of a request's rows flow on."""
        everything = np.ones(len(flow.positions), dtype=np.bool_)
        if flow.prompt is None:
            return everything
        flow.prompt.run(span, flow.positions)
        if not flow.prefills or span + 1 == len(self._spans):
            return everything
        running = flow.prompt.units_of(flow.positions)
        held = flow.prompt.pages(span, running)
        kept = flow.prompt.prune(span + 1, running, flow.piece)
        gone = np.setdiff1d(running, kept, assume_unique=True)
        parked = np.isin(flow.positions // flow.prompt.schedule.unit, gone)
        if len(gone):
            still = flow.prompt.pages(span + 1, kept)
            self._drop(span, flow.req_id, np.setdiff1d(held, still, assume_unique=True))
            if self.parks:
                rows = hidden[torch.from_numpy(parked).to(hidden.device)]
                self._park(span, flow.req_id, flow.positions[parked], rows)
            flow.positions = flow.positions[~parked]
        return ~parked

    def _drop(self, span: int, req_id: str, pages: NDArray[np.int64]) -> None:
        dropped = self.dropped.setdefault(req_id, {})
        for later in range(span + 1, len(self._spans)):
            dropped.setdefault(later, []).extend(pages.tolist())
        self._pruner.counts.pages_parked += len(pages)

    def _park(
        self, span: int, req_id: str, positions: NDArray[np.int64], rows: Tensor
    ) -> None:
        if self._pruner.aux is not None and span + 1 < len(self._spans):
            layer = self._spans[span + 1].first
            self._pruner.aux.park(req_id, positions, layer, rows)
