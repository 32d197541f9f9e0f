"""vLLM's attention on CPU, which leaves out null pages and can tell what was looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_accel.host.v1.lazyllm.keys import KeyLayout
from vllm_accel.lazyllm.importance import attention_paid
from vllm_accel.paging import num_pages, without_nulls


@dataclass
class Scores:
    """Asks one layer what the last rows of some lanes look at."""

    layer_name: str
    lanes: Mapping[str, int]
    """{req_id: lane}"""
    layout: KeyLayout
    block_size: int
    num_rows: int
    """Last rows of a lane that are looked at, as far as it has them."""
    drafts: Mapping[str, int]
    """{req_id: rows behind those}: drafts may turn out wrong, and have no say."""
    found: dict[str, Tensor] = field(default_factory=dict)
    """{req_id: [seq_len] float32}"""

    def take(self, scale: float, query: Tensor, kv_cache: Tensor, metadata: Any) -> None:
        """Takes in attention whose keys are in the cache.

        Args:
            query: [num_rows, num_heads, head_size]
            kv_cache: see `KeyLayout.keys`.
            metadata: CPUAttentionMetadata.
        """
        for req_id, lane in self.lanes.items():
            drafts = self.drafts.get(req_id, 0)
            first, stop = metadata.query_start_loc[lane : lane + 2].tolist()
            stop -= drafts
            rows = query[max(first, stop - self.num_rows) : stop]
            seq_len = int(metadata.seq_lens[lane]) - drafts
            blocks = metadata.block_table[lane, : num_pages(seq_len, self.block_size)]
            keys = self.layout.keys(kv_cache, blocks, seq_len)
            self.found[req_id] = pad(attention_paid(rows, keys, scale), (0, drafts))


@dataclass
class SpanMetadata(cpu_attn.CPUAttentionMetadata):
    """The layers of one KV-cache group share it."""

    scores: Scores | None = None
    only_scores: bool = False
    """Whether nothing else is wanted of the layer."""


class SpanMetadataBuilder(cpu_attn.CPUAttentionMetadataBuilder):
    """vLLM's metadata without null pages.

    It keeps nothing: the block table is the whole state of what is pruned.
    """

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SpanMetadata:
        """See `AttentionMetadataBuilder.build`."""
        if self.kv_cache_spec.span:
            # The group's own shallow copy: vLLM makes one for every group.
            common_attn_metadata.block_table_tensor, common_attn_metadata.seq_lens = (
                without_nulls(
                    common_attn_metadata.block_table_tensor,
                    common_attn_metadata.seq_lens,
                    self.block_size,
                )
            )
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return SpanMetadata(**vars(metadata))


class SpanAttentionImpl(cpu_attn.CPUAttentionBackendImpl):
    """vLLM's attention; asked to, it says what the last rows look at."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SpanMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See `CPUAttentionBackendImpl.forward`."""
        scores = attn_metadata.scores if attn_metadata is not None else None
        if scores is not None and scores.layer_name == layer.layer_name:
            scores.take(self.scale, query, kv_cache, attn_metadata)
        if attn_metadata is not None and attn_metadata.only_scores:
            return output
        attended: Tensor = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        return attended


class SpanAttentionBackend(cpu_attn.CPUAttentionBackend):
    """CPU_ATTN with the two above."""

    @staticmethod
    def get_impl_cls() -> type[SpanAttentionImpl]:
        """See `AttentionBackend.get_impl_cls`."""
        return SpanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SpanMetadataBuilder]:
        """See `AttentionBackend.get_builder_cls`."""
        return SpanMetadataBuilder


def register() -> None:
    """Takes the place of CPU_ATTN in this process; to be called before a model is made."""
    name = f"{SpanAttentionBackend.__module__}.{SpanAttentionBackend.__qualname__}"
    register_backend(AttentionBackendEnum.CPU_ATTN, name)
