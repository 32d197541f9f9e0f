"""Keys are read back from vLLM's own cache, however an instruction set lays them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm import _custom_ops as ops

from vllm_accel.host.v1.lazyllm.attention import Scores
from vllm_accel.host.v1.lazyllm.keys import KeyLayout


class Impl:
    """vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl, as far as it writes."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        num_blocks, num_heads, block_size, _ = kv_cache.shape
        split = kv_cache.view(num_blocks, num_heads, 2 * block_size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *split, slots, layer.isa)


class Scattered(Impl):
    """Lays the elements of a key in an order that no strides describe."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        block_size, head_size = kv_cache.shape[2], key.shape[2]
        order = torch.randperm(
            block_size * head_size, generator=torch.Generator().manual_seed(0)
        )
        for block, rows in enumerate(key.split(block_size)):
            kv_cache[block].flatten(1)[:, order] = rows.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_size", "head_size"), [(32, 32), (128, 64), (64, 128)])
def test_keys_come_back_as_they_were_written(isa, dtype, block_size, head_size):
    layer = SimpleNamespace(isa=isa, impl=Impl(), head_size=head_size, num_kv_heads=2)
    layout = KeyLayout(layer, block_size, dtype)
    cache = torch.zeros(6, 2, block_size, 2 * head_size, dtype=dtype)
    key = torch.randn(3 * block_size, 2, head_size).to(dtype)
    slots = torch.cat([b * block_size + torch.arange(block_size) for b in (4, 1, 2)])
    layer.impl.do_kv_cache_update(layer, key, torch.randn_like(key), cache, slots)
    seen = 3 * block_size - 5
    blocks = torch.tensor([4, 1, 2], dtype=torch.int32)
    assert torch.equal(layout.keys(cache, blocks, seen), key[:seen])


def test_so_do_keys_in_an_order_without_strides():
    layer = SimpleNamespace(impl=Scattered(), head_size=32, num_kv_heads=2)
    layout = KeyLayout(layer, 64, torch.float32)
    cache, key = torch.zeros(2, 2, 64, 64), torch.randn(128, 2, 32)
    layer.impl.do_kv_cache_update(layer, key, key, cache, None)
    assert torch.equal(layout.keys(cache, torch.tensor([0, 1]), 100), key[:100])


def test_drafts_have_no_say_in_what_matters():
    """A lane's rows behind the token given last change nothing and get nothing."""
    keys, query = torch.randn(10, 2, 8), torch.randn(3, 4, 8)
    layout = SimpleNamespace(keys=lambda cache, blocks, seq_len: keys[:seq_len])

    def found(rows, seq_len, drafts):
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor([0, len(rows)]),
            seq_lens=torch.tensor([seq_len]),
            block_table=torch.tensor([[1]]),
        )
        scores = Scores("layer", {"a": 0}, layout, 32, 8, drafts)
        scores.take(0.3, rows, None, metadata)
        return scores.found["a"]

    alone = found(query[:1], 8, {})
    assert torch.equal(found(query, 10, {"a": 2}), torch.nn.functional.pad(alone, (0, 2)))
    assert not torch.allclose(found(query, 10, {})[:8], alone)
