"""Spans as KV-cache groups, on vLLM's own managers and pool."""

import itertools
import pickle

import pytest
import torch

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.request import Request

from vllm_accel.host.v1.lazyllm.aux_store import AuxBlocks
from vllm_accel.host.v1.lazyllm.kv_groups import SpanSpec, groups_of_spans
from vllm_accel.host.v1.lazyllm.scheduler import PoolBooks
from vllm_accel.spans import Span, group_layers

SIZE = 16


def specs(lengths):
    """As they come out of a worker's pickle, one per layer."""
    spans = itertools.chain.from_iterable([k] * n for k, n in enumerate(lengths))
    made = {
        f"model.layers.{layer}.attn": SpanSpec(
            block_size=SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32, span=span
        )
        for layer, span in enumerate(spans)
    }
    return pickle.loads(pickle.dumps(made))


def config(lengths, num_blocks=64):
    groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs(lengths))
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize("lengths", [(2, 2, 4), (3, 3, 6), (4, 4, 4)])
def test_vllm_groups_layers_as_we_say_it_does(lengths):
    edges = [0, *itertools.accumulate(lengths)]
    spans = [Span(*edge) for edge in itertools.pairwise(edges)]
    expected = [group for groups in group_layers(spans) for group in groups]
    found = config(lengths).kv_cache_groups
    layers = [[int(name.split(".")[2]) for name in g.layer_names] for g in found]
    assert layers == [list(group) for group in expected]


def test_layers_of_two_spans_are_never_one_group():
    two = specs((2, 2))
    assert not kv_cache_utils.is_kv_cache_spec_uniform(two)
    assert UniformTypeKVCacheSpecs.from_specs(two) is None
    assert kv_cache_utils.is_kv_cache_spec_uniform(specs((4,)))


@pytest.fixture
def manager():
    return KVCacheManager(
        config((2, 2, 4)),
        max_model_len=512,
        scheduler_block_size=SIZE,
        hash_block_size=SIZE,
        enable_caching=True,
    )


def request(name, length, seed=0):
    kv_cache_utils.init_none_hash(hash)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (length,), generator=generator).tolist()
    hasher = kv_cache_utils.get_request_block_hasher(SIZE, lambda x: pickle.dumps(x)[-32:])
    return Request(name, ids, SamplingParams(max_tokens=9), None, block_hasher=hasher)


def managers_of(manager):
    return manager.coordinator.single_type_managers


def admit(manager, asked):
    blocks, num_computed, _ = manager.get_computed_blocks(asked)
    new = manager.allocate_slots(
        asked,
        asked.num_tokens - num_computed,
        num_new_computed_tokens=num_computed,
        new_computed_blocks=blocks,
        full_sequence_must_fit=True,
    )
    return new and num_computed


def test_pages_given_back_and_taken_again_are_the_pools(manager):
    free = manager.block_pool.get_num_free_blocks()
    one = request("a", 4 * SIZE)
    admit(manager, one)
    books = PoolBooks(manager.coordinator)
    assert books.num_free() == free - 4 * 4
    books.give_back("a", 1, 2)
    assert (books.num_free(), books.block_at("a", 1, 2)) == (free - 15, 0)
    taken = books.take("a", 1, 2)
    assert books.block_at("a", 1, 2) == taken != 0
    books.give_back("a", 2, 0)
    manager.free(one)
    assert books.num_free() == free


def test_the_aux_cache_is_admitted_held_and_freed_with_its_request(manager):
    free = manager.block_pool.get_num_free_blocks()
    holder = managers_of(manager)[1]
    holder.aux_wanted.update(a=3, b=free)
    one = request("a", 4 * SIZE)
    admit(manager, one)
    assert manager.block_pool.get_num_free_blocks() == free - 4 * 4 - 3
    assert len(holder.aux_held["a"]) == 3
    assert admit(manager, request("b", SIZE)) is None
    manager.free(one)
    assert manager.block_pool.get_num_free_blocks() == free
    assert not holder.aux_held


def test_a_request_that_may_be_pruned_publishes_its_first_span_only(manager):
    for group in managers_of(manager):
        group.unpublished.add("pruned")
    admit(manager, request("pruned", 4 * SIZE))
    assert admit(manager, request("dense", 4 * SIZE + 1)) == 0
    assert admit(manager, request("again", 4 * SIZE + 1)) == 4 * SIZE
    cached = manager.block_pool.cached_block_hash_to_block
    assert len(cached) == 4 * 4


def test_rows_of_the_aux_cache_fill_every_layers_part_of_a_block():
    memory = torch.arange(3 * 5 * 24).float()  # 3 layers, 5 blocks, 24 numbers a page
    layers = [memory.view(3, 5, 2, 12)[i] for i in range(3)]
    aux = AuxBlocks(layers, hidden_size=7)
    slots = aux.slots([4, 2])
    assert len(set(slots.tolist())) == len(slots) == 2 * 3 * 3
    rows = aux.store.flatten(0, 1)[torch.from_numpy(slots)]
    owned = torch.cat([layer[block].flatten() for layer in layers for block in (4, 2)])
    assert set(rows.flatten().tolist()) <= set(owned.tolist())


def test_groups_stand_by_span():
    assert groups_of_spans(config((2, 2, 4))) == [[0], [1], [2, 3]]
