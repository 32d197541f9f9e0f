"""A model with an exit, as transformers' Trainer wants it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_accel.errors import ConfigError
from vllm_accel.free.exit_head import ExitAdapter, ExitHead
from vllm_accel.training.cross_entropy import frozen_linear_cross_entropy
from vllm_accel.training.data import IGNORED
from vllm_accel.training.distillation import (
    distillation_loss,
    joint_cross_entropy,
    layer_pairs,
)
from vllm_accel.training.model import targets

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def final_norm(base: Any) -> nn.Module:
    """The norm between a transformers model's last layer and its LM head.

    Raises:
        ConfigError: it has no such norm, or does more to its logits.
    """
    for key in _SCALES:
        if getattr(base.config, key, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"The model's config has {key}={getattr(base.config, key)}: expected one "
                "whose logits are its LM head's alone; train an exit for another model."
            )
    children: dict[str, nn.Module] = dict(base.base_model.named_children())
    for name in _NORMS:
        if name in children:
            return children[name]
    raise ConfigError(
        f"{type(base).__name__} has no final norm that is known, only "
        f"{', '.join(children)}: expected one named {' or '.join(_NORMS)}; train an exit "
        "for another model."
    )


class ShallowDeep(nn.Module):
    """FREE's shallow-deep module: one model, two depths, one norm and LM head.

    Args:
        base: a transformers causal language model.
        adapter: of the exit states.
        exit_layer: L_S, layers before the exit.
        kd: how deep states teach shallow ones, one of `distillation.KINDS`.
        kd_weight: alpha, 0.5 in the paper's scripts.
        freeze_base: only the adapter learns; the deep cross-entropy is left out then, as
            nothing changes it.
        follow_base: the exit learns the deep layers' first choices instead of the text.
    """

    def __init__(
        self,
        base: Any,
        adapter: ExitAdapter,
        *,
        exit_layer: int,
        kd: str,
        kd_weight: float,
        freeze_base: bool,
        follow_base: bool,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(not freeze_base)
        self.adapter = adapter
        self.exit_layer = exit_layer
        self.num_layers: int = base.config.num_hidden_layers
        self.kd = kd
        self.kd_weight = kd_weight
        self.freeze_base = freeze_base
        self.follow_base = follow_base
        self.head = ExitHead(adapter, final_norm(base), base.get_output_embeddings())
        self.train()

    @property
    def trained(self) -> nn.Module:
        """What learns: the adapter, or everything."""
        return self.adapter if self.freeze_base else self

    @property
    def trained_name(self) -> str:
        """What it is called in file names."""
        return "adapter" if self.freeze_base else "model"

    def train(self, mode: bool = True) -> "ShallowDeep":
        """A frozen base stays without dropout."""
        super().train(mode)
        self.base.train(mode and not self.freeze_base)
        return self

    def layer_states(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Per layer from 0, the embeddings, [rows, tokens, hidden_size].

        Before the final norm all but the last, which transformers gives after it.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_base):
            outputs = self.base.base_model(
                input_ids=input_ids, use_cache=False, output_hidden_states=True
            )
        states: tuple[Tensor, ...] = outputs.hidden_states
        return states

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"loss": []}: FREE's joint loss.

        Args:
            input_ids: [rows, tokens] int64.
            labels: [rows, tokens] int64; `IGNORED` where nobody is asked.
        """
        wanted = targets(labels, -1)
        asked = wanted != IGNORED
        layers = [states[asked] for states in self.layer_states(input_ids)]
        students, teachers = self._distilled(layers)
        loss = self._cross_entropies(students[-1], layers[-1], wanted[asked])
        loss = loss + self.kd_weight * distillation_loss(self.kd, students, teachers)
        return {"loss": loss}

    def _distilled(self, layers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Students and teachers, [tokens, hidden_size] after the final norm."""
        pairs = layer_pairs(self.kd, self.exit_layer, self.num_layers)
        students = [self._shallow_state(layers, i) for i in pairs[0]]
        with torch.no_grad():
            teachers = [self._state(layers, i).detach() for i in pairs[1]]
        return students, teachers

    def _shallow_state(self, layers: list[Tensor], layer: int) -> Tensor:
        if layer == self.exit_layer:
            return self.head.states(layers[layer])
        return self._state(layers, layer)

    def _state(self, layers: list[Tensor], layer: int) -> Tensor:
        if layer == self.num_layers:
            return layers[layer]
        return self.head.normed(layers[layer])

    def _cross_entropies(self, shallow: Tensor, deep: Tensor, wanted: Tensor) -> Tensor:
        """L_S CE_S + L_D CE_D over L_S + L_D; states [tokens, hidden_size], normed."""
        of_shallow = self._chosen(deep) if self.follow_base else wanted
        deep_loss = (
            deep.new_zeros((), dtype=torch.float32)
            if self.freeze_base
            else self._cross_entropy(deep, wanted)
        )
        return joint_cross_entropy(
            self._cross_entropy(shallow, of_shallow),
            deep_loss,
            self.exit_layer,
            self.num_layers,
        )

    @torch.no_grad()
    def _chosen(self, deep: Tensor) -> Tensor:
        return self.head.lm_head(deep).max(dim=-1).indices

    def _cross_entropy(self, states: Tensor, wanted: Tensor) -> Tensor:
        """[] float32; a frozen LM head never holds all logits at once."""
        head = self.base.get_output_embeddings()
        if self.freeze_base and head.bias is None:
            return frozen_linear_cross_entropy(states, head.weight, wanted)
        return functional.cross_entropy(head(states).float(), wanted)
