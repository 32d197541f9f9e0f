"""A Llama checkpoint in plain torch, layer by layer: what the naive references run on."""

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM


class LlamaLayers:
    """Has what `lazyllm_reference.Reference` asks of a decoder, in double precision."""

    def __init__(self, folder):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
        config = model.config
        self.num_layers = config.num_hidden_layers
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.embedding = model.model.embed_tokens
        self.layers = [LlamaLayer(layer, config) for layer in model.model.layers]
        self._norm, self._lm_head = model.model.norm, model.lm_head
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def logits(self, hidden):
        return self._lm_head(self._norm(hidden))


class LlamaLayer(nn.Module):
    def __init__(self, layer, config):
        super().__init__()
        self.layer = layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.base = config.rope_parameters["rope_theta"]

    def project(self, hidden, positions):
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (
            projection(normed).unflatten(1, (-1, self.head_dim))
            for projection in projections
        )
        return self._rotated(query, positions), self._rotated(key, positions), value

    def finish(self, hidden, attended):
        hidden = hidden + self.layer.self_attn.o_proj(attended)
        mlp = self.layer.mlp
        normed = self.layer.post_attention_layernorm(hidden)
        inner = functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return hidden + mlp.down_proj(inner)

    def _rotated(self, heads, positions):
        half = self.head_dim // 2
        speeds = self.base ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = (positions[:, None] * speeds)[:, None, :]
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
