"""Every span a KV-cache group of its own: what one costs, who holds its blocks.

Importing this module registers both with vLLM; a spec that comes out of a pickle does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_accel.paging import Groups


@dataclass(frozen=True, kw_only=True)
class SpanSpec(FullAttentionSpec):
    """Full attention in a layer of one span; layers of another span are another kind."""

    span: int
    aux_blocks: int = 0
    """Blocks of the Aux Cache that the longest prompt may hold beside its pages."""

    @classmethod
    def merge(cls, specs: list["SpanSpec"]) -> "SpanSpec":
        """See `KVCacheSpec.merge`: AssertionError unless all are of one span."""
        merged: SpanSpec = super(FullAttentionSpec, cls).merge(specs)
        return merged

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """See `KVCacheSpec.is_uniform_with_collection`."""
        return all(
            isinstance(spec, SpanSpec) and spec.span == self.span
            for spec in kv_cache_specs.values()
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of the longest request, Aux Cache included, so that it is admitted one day."""
        aux: int = self.aux_blocks * self.page_size_bytes
        return aux + super().max_memory_usage_bytes(vllm_config)


class SpanManager(FullAttentionManager):
    """Blocks of one group. That of span 1 also holds the requests' Aux Cache blocks.

    Overrides of FullAttentionManager (vllm/v1/core/single_type_kv_cache_manager.py, 0.32).
    """

    def __init__(self, kv_cache_spec: SpanSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.unpublished: set[str] = set()
        """Requests that may be pruned; the scheduler fills it in when they are added."""
        self.aux_wanted: dict[str, int] = {}
        """Blocks of the Aux Cache that a request is to hold, likewise."""
        self.aux_held: dict[str, list[KVCacheBlock]] = {}

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Publishes no page that a dense request must not read.

        vLLM publishes when a chunk is scheduled, before anything is known to be pruned.
        """
        if self.kv_cache_spec.span == 0 or request.request_id not in self.unpublished:
            super().cache_blocks(request, *args, **kwargs)

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Admission counts the Aux Cache."""
        count: int = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        return count + self._aux_missing(request_id)

    def allocate_new_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        """The request's new pages; its Aux Cache blocks are taken beside them."""
        missing = self._aux_missing(request_id)
        if missing:
            self.aux_held[request_id] = self.block_pool.get_new_blocks(missing)
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, *args, **kwargs
        )
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Everything the request holds."""
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks + self.aux_held.pop(request_id, [])

    def _aux_missing(self, request_id: str) -> int:
        if request_id in self.aux_held:
            return 0
        return self.aux_wanted.get(request_id, 0)


def groups_of_spans(kv_cache_config: KVCacheConfig) -> Groups:
    """Per span, its KV-cache groups."""
    groups: dict[int, list[int]] = {}
    for gid, group in enumerate(kv_cache_config.kv_cache_groups):
        groups.setdefault(group.kv_cache_spec.span, []).append(gid)
    return [groups[span] for span in sorted(groups)]


def most_layers(kv_cache_config: KVCacheConfig) -> Sequence[str]:
    """Names of the layers of the widest group: a block is as large as that."""
    names: Sequence[str] = max(
        (group.layer_names for group in kv_cache_config.kv_cache_groups), key=len
    )
    return names


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(SpanSpec, SpanManager, uniform_type_base_spec=SpanSpec)
