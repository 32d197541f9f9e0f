"""A small decoder over paged KV in plain torch, for tests without an engine.

It keeps the contract of vLLM's attention kernels and nothing else of vLLM: a batch of
sequences, block tables, causal from the end. Pages that nobody wrote hold NaN, so reading
a null page, or one too many, shows in every number after it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_accel.spans import Span, Stream, View

OnAttention = Callable[[int, Tensor, View], None]
"""Called as (layer, query [num_tokens, num_heads, head_dim], view), the layer's keys in
the cache already."""

_SCALE = 0.3  # of the weights: large enough that rows differ, see `testing`


class ToyDecoder(nn.Module):
    """A Llama in small: RMS norms, rotary positions, grouped heads, gated MLP.

    Args:
        num_layers: decoder layers.
        hidden_size: a multiple of twice the query heads.
        heads: query heads, and the fewer key and value heads they share.
        vocab_size: tokens.
        block_size: tokens in a page.
        num_blocks: pages in the cache, the null page included.
        seed: of the weights.
    """

    def __init__(
        self,
        *,
        num_layers: int = 4,
        hidden_size: int = 32,
        heads: tuple[int, int] = (4, 2),
        vocab_size: int = 64,
        block_size: int = 4,
        num_blocks: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_layers = num_layers
        self.block_size = block_size
        num_heads, num_kv_heads = heads
        self.head_dim = hidden_size // num_heads
        self.scale = self.head_dim**-0.5
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            ToyLayer(hidden_size, num_heads, num_kv_heads) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_SCALE)
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, self.head_dim)
        self.kv_cache: Tensor
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]"""
        self.register_buffer("kv_cache", torch.full(shape, torch.nan))

    def embed(
        self,
        token_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
    ) -> Stream:
        """The rows that go into the first layer."""
        return Stream(self.embedding(token_ids), positions)

    def run(
        self,
        span: Span,
        stream: Stream,
        view: View,
        on_attention: OnAttention | None = None,
    ) -> Stream:
        """The rows as they come out of a span; their keys and values are in the cache."""
        hidden = stream.hidden
        for layer in range(span.first, span.stop):
            block = cast(ToyLayer, self.layers[layer])
            query, key, value = block.project(hidden, stream.positions)
            self.kv_cache[layer].flatten(1, 2)[:, view.slot_mapping] = torch.stack(
                [key, value]
            )
            if on_attention is not None:
                on_attention(layer, query, view)
            hidden = block.finish(hidden, self._attend(layer, query, view))
        return Stream(hidden, stream.positions)

    def attend(
        self, layer: int, stream: Stream, view: View, on_attention: OnAttention
    ) -> None:
        """Runs a layer as far as its attention; keys and values are in the cache."""
        block = cast(ToyLayer, self.layers[layer])
        query, key, value = block.project(stream.hidden, stream.positions)
        self.kv_cache[layer].flatten(1, 2)[:, view.slot_mapping] = torch.stack([key, value])
        on_attention(layer, query, view)

    def logits(
        self,
        hidden: Tensor,  # [num_tokens, hidden_size]
    ) -> Tensor:
        """[num_tokens, vocab] of rows that came out of the last layer."""
        result: Tensor = self.lm_head(self.norm(hidden))
        return result

    def keys(self, layer: int, view: View, lane: int) -> Tensor:
        """[seq_len, num_kv_heads, head_dim] the keys a lane sees in a layer."""
        return self._seen(layer, view, lane)[0]

    def _seen(self, layer: int, view: View, lane: int) -> Tensor:
        seq_len = int(view.seq_lens[lane])
        blocks = view.block_table[lane, : -(-seq_len // self.block_size)]
        return self.kv_cache[layer][:, blocks].flatten(1, 2)[:, :seq_len]

    def _attend(self, layer: int, query: Tensor, view: View) -> Tensor:
        starts = view.query_start_loc.tolist()
        outputs = []
        for lane, (first, stop) in enumerate(pairwise(starts)):
            keys, values = self._seen(layer, view, lane)
            outputs.append(self._attend_lane(query[first:stop], keys, values))
        return torch.cat(outputs)

    def _attend_lane(
        self,
        query: Tensor,  # [num_rows, num_heads, head_dim]
        keys: Tensor,  # [seq_len, num_kv_heads, head_dim]
        values: Tensor,  # as keys
    ) -> Tensor:
        """[num_rows, num_heads * head_dim], the last row on the last key."""
        num_rows, seq_len = len(query), len(keys)
        future = torch.ones(num_rows, seq_len, dtype=torch.bool).triu(
            seq_len - num_rows + 1
        )
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        logits = torch.einsum("rhd,chd->hrc", query, keys) * self.scale
        weights = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
        return torch.einsum("hrc,chd->rhd", weights, values).flatten(1)


class ToyLayer(nn.Module):
    """One decoder layer, in the two halves around its attention."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.head_dim = head_dim
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden_size)
        self.gate_up = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.down = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [num_tokens, heads, head_dim] each, rotated."""
        joint: Tensor = self.qkv(self.attention_norm(hidden))
        query, key, value = joint.unflatten(1, (-1, self.head_dim)).split(self.heads, dim=1)
        return _rotated(query, positions), _rotated(key, positions), value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: [num_tokens, hidden_size]."""
        hidden = hidden + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        result: Tensor = hidden + self.down(functional.silu(gate) * up)
        return result


def _rotated(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, halves as pairs: [num_tokens, num_heads, head_dim]."""
    half = heads.shape[-1] // 2
    speeds = 100.0 ** -(torch.arange(half) / half)
    angles = (positions[:, None] * speeds)[:, None, :]
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
