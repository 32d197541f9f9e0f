"""One drafting step of FREE: shallow layers token by token, for the requests still sure.

The engine's adapter runs the layers; whom to draft for, how far, and what is kept for the
deep layers is decided here, on plain tensors.
"""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from vllm_accel.free.exit_head import ExitReading, ExitSignals
from vllm_accel.free.gates import ExitGate
from vllm_accel.free.stack import ExitStacks, ShallowRows
from vllm_accel.speculate import Decoding, Opening, StepReport

Shallow = Callable[[ShallowRows], ExitReading]
"""Runs the layers before the exit, and what the model would say there."""


@dataclass(frozen=True, slots=True)
class Stackable(Decoding):
    """The requests of a step, with what a stack needs to know."""

    positions: Sequence[int]
    """Index in the sequence of the token in `next_tokens`."""
    stop_token_ids: Sequence[Container[int]]
    """Tokens that end the request."""
    quality: Sequence[float]
    """Share of its tokens that the deep layers should agree with."""


class FreeDrafter:
    """Drafts for the requests whose gate is open.

    Args:
        stacks: where drafts and exit states wait for the deep layers.
        gate: decides whom to draft for, and how far.
        drafts_are_final: mode "exit", where the gate says which drafts are.
    """

    def __init__(
        self,
        stacks: ExitStacks,
        gate: ExitGate,
        *,
        drafts_are_final: bool = False,
    ) -> None:
        self._drafts_are_final = drafts_are_final
        self.stacks = stacks
        self._gate = gate
        self._opening = Opening()

    def draft(
        self,
        step: Stackable,
        shallow: Shallow,
        report: StepReport,
        *,
        may_draft: bool = True,
    ) -> list[list[int]]:
        """Draft tokens per request, at most as many as it has room for.

        Args:
            report: gains this step's decisions.
            may_draft: False asks the gate, and runs no layer.
        """
        began = time.perf_counter()
        self._open(step, report, may_draft)
        quality = dict(zip(step.req_ids, step.quality, strict=True))
        while rows := self.stacks.next_rows():
            self._shallow_step(rows, [quality[one] for one in rows.req_ids], shallow)
            report.shallow_steps += 1
            report.shallow_rows += len(rows.req_ids)
        drafts = [self.stacks.drafts(req_id) for req_id in step.req_ids]
        report.draft_lengths.update(
            len(draft) for draft, row in zip(drafts, step.rows, strict=True) if row >= 0
        )
        report.draft_seconds = time.perf_counter() - began
        return drafts

    def _open(self, step: Stackable, report: StepReport, may_draft: bool) -> None:
        def admit(able: list[int], decoding: int) -> list[bool]:
            return self._gate.admit([step.req_ids[i] for i in able], decoding)

        opened = self._opening.requests(
            step, admit, self._gate.reason, report, may_draft=may_draft
        )
        for i in opened:
            self.stacks.open(
                step.req_ids[i],
                step.positions[i],
                step.next_tokens[i],
                step.room[i],
                step.stop_token_ids[i],
            )

    def _shallow_step(
        self, rows: ShallowRows, quality: Sequence[float], shallow: Shallow
    ) -> None:
        read = shallow(rows)
        said = ExitSignals(read.logits, rows.req_ids, quality, read)
        exits = self._gate.exits(said)
        final = self._gate.final(said) if self._drafts_are_final else None
        token_ids = said.token_ids.tolist()
        self.stacks.push(rows, read.kept, token_ids, said.sureness, exits, final)
        going_on = [i for i, yes in zip(rows.req_ids, exits, strict=True) if yes]
        if not self._gate.goes_on(going_on):
            self.stacks.close(going_on)
