"""FREE (arXiv 2310.05424) in plain torch, one request at a time: what engines must equal.

Written from the description of the published algorithm. It keeps what the engine spreads
over steps in one loop: shallow layers token by token while confident, then the deep layers
once on everything stacked. Mode "exit" is the paper's, where confident tokens are final;
"verify" takes the deep layers' word instead.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_accel.free.exit_head import ExitAdapter, ExitHead, ExitSignals
from vllm_accel.free.stack import first_to_undo
from vllm_accel.gating.beta_mixture import BetaMixture
from vllm_accel.paging import num_pages
from vllm_accel.spans import Lane, Span, Stream, view_of
from vllm_accel.toy import ToyDecoder

MOST_UPDATES = 300  # of the threshold, for T5; one per sequence


class Layers(Protocol):
    """A decoder for one sequence, layer by layer."""

    num_layers: int

    def embed(self, token_ids: list[int]) -> Tensor:
        """[tokens, hidden_size], what goes into the first layer."""
        ...

    def run(self, first: int, stop: int, hidden: Tensor, position: int) -> Tensor:
        """[tokens, hidden_size] after layers [first, stop).

        The tokens are at `position` and after it; what these layers had cached from there
        on is forgotten.
        """
        ...

    def head(self, adapter: ExitAdapter | None = None) -> ExitHead:
        """Final norm and LM head, of an exit or of the whole model."""
        ...


class ToyLayers:
    """`ToyDecoder`, one of its sequences."""

    def __init__(self, toy: ToyDecoder, pages: range) -> None:
        self.toy = toy
        self.num_layers = toy.num_layers
        self._pages = list(pages)

    def embed(self, token_ids: list[int]) -> Tensor:
        return self.toy.embedding(torch.tensor(token_ids))

    def run(self, first: int, stop: int, hidden: Tensor, position: int) -> Tensor:
        positions = np.arange(position, position + len(hidden))
        seen = np.arange(num_pages(position + len(hidden), self.toy.block_size))
        lane = Lane("", positions, seen, position + len(hidden))
        view = view_of([lane], lambda _: self._pages, self.toy.block_size)
        stream = Stream(hidden, torch.from_numpy(positions))
        return self.toy.run(Span(first, stop), stream, view).hidden

    def head(self, adapter: ExitAdapter | None = None) -> ExitHead:
        return ExitHead(adapter or _NO_ADAPTER, self.toy.norm, self.toy.lm_head)


class TransformersLayers:
    """A transformers model of Llama's form."""

    def __init__(self, model) -> None:
        from transformers import DynamicCache

        self.model = model
        self.num_layers = model.config.num_hidden_layers
        self._cache = DynamicCache(config=model.config)

    def embed(self, token_ids: list[int]) -> Tensor:
        return self.model.model.embed_tokens(torch.tensor(token_ids))

    def run(self, first: int, stop: int, hidden: Tensor, position: int) -> Tensor:
        rows, inner = len(hidden), self.model.model
        places = torch.arange(position, position + rows)[None]
        rotary = inner.rotary_emb(hidden[None], position_ids=places)
        future = torch.ones(rows, position + rows, dtype=torch.bool).triu(position + 1)
        mask = torch.zeros(future.shape).masked_fill(future, -torch.inf)[None, None]
        for i in range(first, stop):
            self._forget_from(i, position)
            hidden = inner.layers[i](
                hidden.view(1, rows, -1),
                attention_mask=mask,
                position_ids=places,
                past_key_values=self._cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return hidden.view(rows, -1)

    def _forget_from(self, layer: int, position: int) -> None:
        if layer < len(self._cache.layers) and self._cache.layers[layer].is_initialized:
            cached = self._cache.layers[layer]
            cached.keys = cached.keys[..., :position, :]
            cached.values = cached.values[..., :position, :]
            assert cached.keys.shape[-2] == position, "a hole in the cache"

    def head(self, adapter: ExitAdapter | None = None) -> ExitHead:
        return ExitHead(adapter or _NO_ADAPTER, self.model.model.norm, self.model.lm_head)


_NO_ADAPTER = ExitAdapter("none", 0, 0)


@dataclass
class Answer:
    """What was said, and at what price."""

    token_ids: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    """Per round, tokens that left at the exit."""
    kept: list[int] = field(default_factory=list)
    """Per round, how many of these became part of the answer."""
    shallow_rows: int = 0
    deep_rows: int = 0
    threshold: float = 0.0


@dataclass
class _Round:
    """Tokens stacked since the last deep pass."""

    token_ids: list[int]
    states: list[Tensor] = field(default_factory=list)  # [1, hidden_size] each
    predicted: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


class Free:
    """The published algorithm.

    Args:
        layers: the model.
        exit_layer: L_S.
        mode: "exit" or "verify".
        threshold: lambda, or the estimator it is learnt by.
        adapter: of the exit; None as in the paper.
        cap: most tokens drafted in a row; None as in the paper.
        rollback: RollBack's limit on -ln p, in mode "exit"; None: off.
        deep_end: the last token of an answer is the deep layers' own, as an engine's is;
            the paper's may leave at the exit.
    """

    def __init__(
        self,
        layers: Layers,
        exit_layer: int,
        mode: str,
        threshold: float | BetaMixture,
        adapter: ExitAdapter | None = None,
        cap: int | None = None,
        rollback: float | None = None,
        deep_end: bool = False,
    ) -> None:
        self._deep_end = deep_end or mode == "verify"
        self.layers, self.exit_layer, self.mode = layers, exit_layer, mode
        self.cap, self.rollback = cap, rollback
        self.estimator = threshold if isinstance(threshold, BetaMixture) else None
        self.threshold = self.estimator.threshold() if self.estimator else threshold
        self.updates = 0
        self.confidence: list[float] = []
        self.agree: list[bool] = []
        self._shallow, self._deep = layers.head(adapter), layers.head()

    @torch.no_grad()
    def generate(
        self, prompt: list[int], max_tokens: int, stop_token_ids: Container[int] = ()
    ) -> Answer:
        """The greedy answer to a prompt."""
        self._update_threshold()
        answer = Answer(threshold=self.threshold)
        states = self.layers.run(0, self.layers.num_layers, self.layers.embed(prompt), 0)
        new = [int(self._deep.logits(states[-1:]).argmax())]
        while True:
            for token in new:
                answer.token_ids.append(token)
                if token in stop_token_ids or len(answer.token_ids) == max_tokens:
                    return answer
            position = len(prompt) + len(answer.token_ids) - 1
            room = max_tokens - len(answer.token_ids)
            new = self._round(answer, position, room, stop_token_ids)

    def _update_threshold(self) -> None:
        if self.estimator and self.confidence and self.updates < MOST_UPDATES:
            self.estimator.fit(np.array(self.confidence), np.array(self.agree))
            self.threshold = self.estimator.threshold()
            self.updates += 1

    def _round(
        self, answer: Answer, position: int, room: int, stop: Container[int]
    ) -> list[int]:
        """New tokens: drafts that stand, and what the deep layers say after them."""
        stack = _Round([answer.token_ids[-1]])
        # The deep layers add a token of their own, unless the answer ends at the exit.
        most = min(room - self._deep_end, self.cap or room)
        while self._draft(stack, position, most, stop):
            pass
        answer.shallow_rows += len(stack.states)
        drafts = stack.token_ids[1:]
        answer.drafted.append(len(drafts))
        ended = len(drafts) == room or (drafts and drafts[-1] in stop)
        new = drafts if self.mode == "exit" and ended else self._deepen(stack, position)
        answer.deep_rows += 0 if new is drafts else len(stack.states)
        answer.kept.append(len(new) - (new is not drafts))
        return new

    def _draft(self, stack: _Round, position: int, most: int, stop: Container[int]) -> bool:
        """Runs the newest token through the shallow layers; whether to go on."""
        state = self._exit_state(stack, position)
        said = ExitSignals(self._shallow.logits(state))
        stack.predicted.append(int(said.token_ids))
        stack.confidence.append(float(said.confidence))
        if most < 1 or not stack.confidence[-1] > self.threshold:
            return False
        stack.token_ids.append(stack.predicted[-1])
        drafted = len(stack.token_ids) - 1
        return drafted < most and stack.predicted[-1] not in stop

    def _exit_state(self, stack: _Round, position: int) -> Tensor:
        row = self.layers.embed(stack.token_ids[-1:])
        state = self.layers.run(0, self.exit_layer, row, position + len(stack.states))
        stack.states.append(state)
        return state

    def _deepen(self, stack: _Round, position: int) -> list[int]:
        """The deep layers, once on every stacked row and the current one."""
        drafts = stack.token_ids[1:]
        if len(stack.states) == len(drafts):  # the cap was reached
            self._exit_state(stack, position)
        states = torch.cat(stack.states)
        span = self.exit_layer, self.layers.num_layers
        logits = self._deep.logits(self.layers.run(*span, states, position))
        deep = logits.argmax(dim=-1).tolist()
        standing = self._standing(drafts, deep, logits)
        if drafts:
            seen = len(drafts) if self.mode == "exit" else standing
            pairs = list(zip(stack.predicted, deep, strict=False))[: seen + 1]
            self.agree += [shallow == said for shallow, said in pairs]
            self.confidence += stack.confidence[: len(pairs)]
        return [*drafts[:standing], deep[standing]]

    def _standing(self, drafts: list[int], deep: list[int], logits: Tensor) -> int:
        """How many drafts stand."""
        if self.mode == "verify":
            wrong = [i for i, token in enumerate(drafts) if token != deep[i]]
            return wrong[0] if wrong else len(drafts)
        rows = torch.arange(len(drafts))
        surprise = -logits.log_softmax(dim=-1)[rows, drafts] if drafts else rows
        undone = first_to_undo(surprise.tolist(), self.rollback)
        return len(drafts) if undone is None else undone
