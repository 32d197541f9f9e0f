"""The host loop of `toy_engine` over vLLM's own Llama and CPU attention: no engine."""

from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from toy_engine import ToyEngine
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_accel.host.decoder import Decoder
from vllm_accel.host.v1.lazyllm import attention
from vllm_accel.host.v1.lazyllm.aux_store import AuxBlocks
from vllm_accel.host.v1.lazyllm.forward import SpanForward, averaged
from vllm_accel.host.v1.lazyllm.kv_groups import SpanSpec
from vllm_accel.lazyllm.aux_cache import AuxCache
from vllm_accel.spans import Span, Stream


@cache
def load(folder, block_size):
    """vLLM's config and model, once per process."""
    attention.register()
    arguments = EngineArgs(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=block_size,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
        with patch.object(torch.accelerator, "empty_cache", lambda: None):
            return config, get_model(vllm_config=config)


class VllmEngine(ToyEngine):
    """Prefill and decoding of several requests; its toy is vLLM's model.

    Args:
        folder: of a tiny model.
        config: LazyConfig.
        dtype: of the model is its own; blocks of 32 tokens.
    """

    def __init__(self, folder, config, num_blocks=256):
        self.vllm_config, self.model = load(folder, 32)
        self.decoder = Decoder(self.model, self.vllm_config)
        hidden_size = self.decoder.hidden_size
        toy = SimpleNamespace(
            block_size=32,
            num_layers=self.decoder.num_layers,
            kv_cache=torch.empty(0, 0, num_blocks),
            embedding=SimpleNamespace(weight=torch.empty(0, hidden_size)),
            logits=self.model.compute_logits,
        )
        super().__init__(toy, config)
        caches = self._make_caches(num_blocks)
        self.free_aux = list(range(num_blocks * 32))  # asked for even where unused
        if config.revives:
            blocks = AuxBlocks(caches, hidden_size)
            self.free_aux = blocks.slots(range(num_blocks - 16, num_blocks)).tolist()
            self.books.free_ids = [i for i in self.books.free_ids if i < num_blocks - 16]
            self.pruner.aux = AuxCache(blocks.store)
        schedule = self.pruner.schedule
        self.forward = SpanForward(self, self.decoder, schedule, self.groups)

    def _make_caches(self, num_blocks):
        """Layers' caches as vLLM's groups have them; what SpanForward asks of a runner."""
        config = self.vllm_config.compilation_config
        self.compilation_config = config
        names = list(config.static_forward_context)
        groups = [[] for _ in range(self.books.num_groups)]
        for layer, name in enumerate(names):
            groups[self.group_of[layer]].append(name)
        longest = max(map(len, groups))
        first = config.static_forward_context[names[0]]
        shape = (longest, num_blocks, first.num_kv_heads, 32, 2 * first.head_size)
        memory = torch.zeros(shape)
        specs = []
        for gid, group in enumerate(groups):
            span = next(k for k, gids in enumerate(self.groups) if gid in gids)
            specs.append(
                SpanSpec(
                    block_size=32,
                    num_kv_heads=first.num_kv_heads,
                    head_size=first.head_size,
                    dtype=torch.float32,
                    span=span,
                )
            )
            for i, name in enumerate(group):
                config.static_forward_context[name].kv_cache = memory[i]
        pairs = zip(groups, specs, strict=True)
        self.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[
                SimpleNamespace(layer_names=group, kv_cache_spec=spec)
                for group, spec in pairs
            ]
        )
        with set_current_vllm_config(self.vllm_config):
            self.attn_groups = [
                [self._group(g)] for g in self.kv_cache_config.kv_cache_groups
            ]
        return list(memory)

    def _group(self, group):
        builder = attention.SpanMetadataBuilder(
            group.kv_cache_spec, group.layer_names, self.vllm_config, torch.device("cpu")
        )
        return SimpleNamespace(get_metadata_builder=lambda: builder)

    @property
    def requests(self):
        return {r: SimpleNamespace(block_ids=rows) for r, rows in self.rows.items()}

    def wipe(self):
        """Pages that nobody owns hold what is far from every key and value."""
        free = torch.tensor(self.books.free_ids)
        for layer in self.compilation_config.static_forward_context.values():
            layer.kv_cache[free] = 1e3

    @torch.inference_mode()
    def step(self, req_ids, most=None):
        with set_forward_context({}, self.vllm_config, slot_mapping={"": torch.empty(0)}):
            return super().step(req_ids, most)

    def _ids(self, pieces):
        ids = [t for req_id, p in pieces.items() for t in self.tokens[req_id][slice(*p)]]
        positions = np.concatenate([np.arange(*piece) for piece in pieces.values()])
        return torch.tensor(ids, dtype=torch.int32), torch.from_numpy(positions)

    def _run_spans(self, step, pieces):
        self.steps_in_spans += 1
        out = self.forward.run(step, *self._ids(pieces))
        assert len(out) == sum(stop - first for first, stop in pieces.values())
        return out[torch.from_numpy(step.origin)]

    def _run_whole(self, step, pieces):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        for groups in self.groups:
            for gid in groups:
                metadata, slots = self._whole_metadata(pieces, gid)
                for name in self.kv_cache_config.kv_cache_groups[gid].layer_names:
                    context.attn_metadata[name] = metadata
                    context.slot_mapping[name] = slots
        asked = self.forward.ask(step)
        ids, positions = self._ids(pieces)
        whole = Span(0, self.decoder.num_layers)
        hidden, _ = self.decoder.run(whole, ids, None, positions)
        for k, scores in enumerate(asked):
            step.note(k, averaged(scores))
        return Stream(hidden, positions).hidden

    def _whole_metadata(self, pieces, gid):
        """From rows with nulls in them, as the runner has them: the builder's to mend."""
        width = max(len(self.rows[req_id][gid]) for req_id in pieces)
        table = torch.zeros(len(pieces), width, dtype=torch.int32)
        places = []
        for i, (req_id, piece) in enumerate(pieces.items()):
            row = np.array(self.rows[req_id][gid])
            table[i, : len(row)] = torch.from_numpy(row)
            positions = np.arange(*piece)
            places.append(row[positions // 32] * 32 + positions % 32)
        counts = [stop - first for first, stop in pieces.values()]
        starts = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        slots = torch.from_numpy(np.concatenate(places))
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([stop for _, stop in pieces.values()], dtype=torch.int32),
            num_reqs=len(pieces),
            num_actual_tokens=len(slots),
            max_query_len=max(counts),
            max_seq_len=max(stop for _, stop in pieces.values()),
            block_table_tensor=table,
            slot_mapping=slots,
        )
        (group,) = self.attn_groups[gid]
        return group.get_metadata_builder().build(0, common), slots
