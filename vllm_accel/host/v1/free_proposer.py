"""The class vLLM's "custom_class" loads for FREE: the target's own layers, cut in two."""

import logging
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_accel.free import checkpoint
from vllm_accel.free.drafter import FreeDrafter, Shallow, Stackable
from vllm_accel.free.exit_head import ExitAdapter, ExitHead, ExitReading
from vllm_accel.free.gates import make_gate
from vllm_accel.free.stack import ExitStacks, Seen
from vllm_accel.host import carrier
from vllm_accel.host.decoder import Decoder, residual_dtype
from vllm_accel.host.exits import folder_of, learning_of
from vllm_accel.host.report import StepTime
from vllm_accel.spans import Span
from vllm_accel.speculate import StepReport

logger = logging.getLogger("vllm.vllm_accel")


class FreeProposer:
    """Cuts the target at the exit; drafts when the runner has room for it."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._config = config = carrier.unloaded(vllm_config)
        self._dtype = vllm_config.model_config.dtype
        self._gate = make_gate(
            config.gate,
            draft_tokens=config.num_speculative_tokens,
            threshold=config.threshold,
            learning=learning_of(config),
        )
        self.stacks = ExitStacks(
            cap=config.num_speculative_tokens,
            max_reqs=vllm_config.scheduler_config.max_num_seqs,
            state_width=2 * vllm_config.model_config.get_hidden_size(),
            dtype=residual_dtype(vllm_config),
        )
        self.drafts_are_final = config.mode == "exit"
        self.exit_quality = config.exit_quality
        self.rollback = config.rollback
        self._decoder: Decoder | None = None
        self._head: ExitHead | None = None
        self._drafter: FreeDrafter | None = None

    def load_model(self, target: nn.Module) -> None:
        """Cuts the target, loads the adapter; called by vLLM after the target's weights.

        Raises:
            UnsupportedHost: the target cannot be cut.
        """
        decoder = Decoder(target, self._vllm_config)
        exit_layer = self._config.exit_layer
        self._spans = Span(0, decoder.num_layers).split(exit_layer)
        head = ExitHead(self._adapter(), decoder.norm, target.compute_logits, self._dtype)
        self._decoder, self._head = decoder, head
        self._drafter = FreeDrafter(
            self.stacks, self._gate, drafts_are_final=self.drafts_are_final
        )
        logger.info("free: exit after %d of %d layers", exit_layer, decoder.num_layers)

    def _adapter(self) -> ExitAdapter:
        folder = folder_of(self._config, self._vllm_config.model_config)
        if folder is None:
            return ExitAdapter("none", 0, 0)
        _, adapter = checkpoint.load(folder)
        return adapter.to(self._dtype)

    def warm_up(self) -> None:
        """Compiles both spans, and the first with the exit, where vLLM compiles models."""
        shallow, deep = self._spans
        for span, ending in ((shallow, None), (shallow, self._head.read), (deep, None)):
            self._decoder.prepare(span, ending)

    def read(self, token_ids: Tensor, positions: Tensor) -> ExitReading:
        """Of tokens [n] int32 at positions [n] int64."""
        shallow = self._spans[0]
        return self._decoder.run(shallow, token_ids, None, positions, self._head.read)

    def shallow(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[n, 2 * hidden_size] as in `ExitReading.kept`, of the same."""
        return torch.cat(
            self._decoder.run(self._spans[0], token_ids, None, positions), dim=-1
        )

    def deepen(self, handed_on: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
        """[n, hidden_size] after the final norm, of exit states [n, hidden_size] twice."""
        handed_on = handed_on.to(self._dtype)
        return self._decoder.run(self._spans[1], handed_on, residual, positions)[0]

    def start_step(self, measured: list[StepTime], req_ids: Container[str]) -> None:
        """Tells the gate how long steps took and which requests still live."""
        for step in measured:
            self._gate.observe(step.shape, step.seconds)
        self._gate.keep_only(req_ids)

    def learn(self, seen: Seen) -> None:
        """Tells the gate what the deep layers said of a stack."""
        self._gate.learn(seen)

    @torch.inference_mode()
    def propose(
        self, step: Stackable, shallow: Shallow, report: StepReport, *, may_draft: bool
    ) -> list[list[int]]:
        """See `FreeDrafter.draft`; our runner calls this, vLLM's never does."""
        drafter: Any = self._drafter
        return drafter.draft(step, shallow, report, may_draft=may_draft)
