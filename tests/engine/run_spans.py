"""Spans of vLLM's own Llama on vLLM's CPU attention, without an engine around them.

python run_spans.py FOLDER DTYPE eager|compiled: two requests have a prompt; then five
tokens of each go through the whole model, at once and one by one, and, on the same prompts
again, through the first layers, in both ways, and from there through the others at once.
Prints RESULT and what came out alike.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from vllm import ir
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop
from vllm.v1.worker.utils import AttentionGroup

from vllm_accel.free.exit_head import ExitAdapter, ExitHead
from vllm_accel.host.decoder import Decoder
from vllm_accel.host.v1.span_context import SpanContext
from vllm_accel.spans import Span
from vllm_accel.testing import write_tiny_model

LAYERS, BLOCK, HEADS, WIDTH = 4, 32, 2, 32
PROMPTS, DRAFTED = (30, 17), 4  # the first request's new tokens begin a page
TABLE = np.array([[1, 3], [2, 5]], dtype=np.int32)
TOKENS = torch.randint(1, 64, (2, 40), generator=torch.manual_seed(0)).int()


class Model:
    """A tiny model with a cache, and contexts to run it in."""

    def __init__(self, folder, dtype, eager):
        model = write_tiny_model(folder / "model", layers=LAYERS)
        self.config = EngineArgs(
            model=str(model), enforce_eager=eager, dtype=dtype, skip_tokenizer_init=True
        ).create_engine_config()
        # As vllm/v1/worker/worker_base.py does it: what the compiler sees of a norm.
        self.config.kernel_config.ir_op_priority.set_default()
        ir.set_default_torch_wrap(self.config.compilation_config.ir_enable_torch_wrap)
        with set_current_vllm_config(self.config):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            initialize_model_parallel(1)
            self.model = get_model(vllm_config=self.config)
            self.layers = self.config.compilation_config.static_forward_context
            self._make_cache(getattr(torch, dtype))
        self.decoder = Decoder(self.model, self.config)
        adapter = ExitAdapter("mlp", WIDTH * HEADS, 8).to(getattr(torch, dtype))
        torch.nn.init.normal_(adapter.up.weight, std=0.2)
        norm, lm_head = self.decoder.norm, self.model.compute_logits
        self.head = ExitHead(adapter, norm, lm_head, getattr(torch, dtype))

    def _make_cache(self, dtype):
        for layer in self.layers.values():
            layer.kv_cache = torch.zeros(8, HEADS, BLOCK, 2 * WIDTH, dtype=dtype)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH, dtype=dtype
        )
        group = AttentionGroup(CPUAttentionBackend, list(self.layers), spec, 0)
        group.create_metadata_builders(self.config, torch.device("cpu"), BLOCK)
        table = SimpleNamespace(get_numpy_array=lambda: TABLE, block_size=BLOCK)
        self.runner = SimpleNamespace(
            attn_groups=[[group]],
            vllm_config=self.config,
            input_batch=SimpleNamespace(block_table=[table]),
        )

    def rows(self, firsts, count):
        """Tokens, positions and context of `count` tokens of each of the first requests."""
        positions = np.concatenate([np.arange(first, first + count) for first in firsts])
        tokens = [TOKENS[i, first : first + count] for i, first in enumerate(firsts)]
        requests = np.arange(len(firsts))
        lens = np.full_like(requests, count)
        context = SpanContext(self.runner, requests, lens, positions)
        return torch.cat(tokens), torch.from_numpy(positions), context

    def whole(self, firsts, count):
        tokens, positions, context = self.rows(firsts, count)
        with override_forward_context(context.forward):
            return self.model.model(tokens, positions, None)

    def prefill(self):
        for layer in self.layers.values():
            layer.kv_cache.zero_()
        positions = np.concatenate([np.arange(n) for n in PROMPTS])
        tokens = torch.cat([TOKENS[i, :n] for i, n in enumerate(PROMPTS)])
        context = SpanContext(self.runner, np.arange(2), np.array(PROMPTS), positions)
        with override_forward_context(context.forward):
            self.model.model(tokens, torch.from_numpy(positions), None)

    def cache(self):
        return [layer.kv_cache.clone() for layer in self.layers.values()]


def token_by_token(made, firsts, run, *, move):
    """What `run` gives for the five tokens of each, a row of each at a time."""
    made.prefill()
    context, given = None, []
    for step in range(1 + DRAFTED):
        tokens, positions, anew = made.rows([n + step for n in firsts], 1)
        if context is None or not move:
            context = anew
        else:
            context.move_to(positions.numpy())
        with override_forward_context(context.forward):
            given.append(run(tokens, positions))
    return given


def whole_rows(made):
    """States of the whole model token by token, and its cache then."""

    def run(tokens, at):
        return made.model.model(tokens, at, None)

    states = token_by_token(made, PROMPTS, run, move=False)
    return [*states, *made.cache()]


def drafted(made, exit_layer, firsts=PROMPTS):
    """What the exit says, token by token, and the cache then."""

    def run(tokens, at):
        return made.decoder.run(Span(0, exit_layer), tokens, None, at, made.head.read)

    return token_by_token(made, firsts, run, move=True), made.cache()


def deepened_rows(made, exit_layer):
    """As `whole_rows`, through the exit and on from what was read there."""
    shallow, deep = Span(0, LAYERS).split(exit_layer)

    def run(tokens, at):
        said = made.decoder.run(shallow, tokens, None, at, made.head.read)
        return made.decoder.run(deep, said.handed_on, said.residual, at)[0]

    states = token_by_token(made, PROMPTS, run, move=True)
    return [*states, *made.cache()]


def all_at_once(made, exit_layer):
    """What the first layers hand on of all ten rows."""
    made.prefill()
    tokens, positions, context = made.rows(PROMPTS, 1 + DRAFTED)
    with override_forward_context(context.forward):
        return made.decoder.run(Span(0, exit_layer), tokens, None, positions)


def deepened(made, exit_layer, hidden, residual):
    """States after the other layers, of all ten rows, and the cache then."""
    _, positions, context = made.rows(PROMPTS, 1 + DRAFTED)
    with override_forward_context(context.forward):
        deep = Span(exit_layer, LAYERS)
        return [made.decoder.run(deep, hidden, residual, positions)[0], *made.cache()]


def says_what_its_head_says(made, reading):
    """A compiled reading beside an eager one of its states, which rounds more often."""
    eager = made.head.read(reading.handed_on, reading.residual)
    off = 1e-4 if eager.logits.dtype == torch.float32 else 0.1
    sure = eager.confidence > off
    return (
        torch.equal(eager.exit_states, reading.exit_states)
        and torch.allclose(eager.confidence, reading.confidence, atol=off)
        and torch.equal(eager.token_ids[sure], reading.token_ids[sure])
    )


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.inference_mode()
def main(folder, dtype, eager):
    made = Model(folder, dtype, eager)
    if not eager:  # vLLM compiles the whole for any number of rows when it warms up
        with override_forward_context(create_forward_context(None, made.config)):
            made.model.model(torch.arange(16).int(), torch.arange(16), None)
    made.prefill()
    before = made.cache()
    whole = [made.whole(PROMPTS, 1 + DRAFTED), *made.cache()]
    row_by_row = whole_rows(made)
    alike = {}
    for exit_layer in (1, 3):
        at_once = deepened(made, exit_layer, *all_at_once(made, exit_layer))
        alone, _ = drafted(made, exit_layer, PROMPTS[:1])
        said, cache = drafted(made, exit_layer)
        kept = zip(*((each.handed_on, each.residual) for each in said), strict=True)
        rows = [torch.stack(part, 1).flatten(0, 1) for part in kept]
        readings = [says_what_its_head_says(made, each) for each in (*alone, *said)]
        alike[exit_layer] = {
            "readings": all(readings),
            "deep_layers_untouched": equal(cache[exit_layer:], before[exit_layer:]),
            "on_from_a_reading": equal(deepened_rows(made, exit_layer), row_by_row),
            "two_spans_are_the_whole": equal(at_once, whole),
            "from_drafts_too": equal(deepened(made, exit_layer, *rows), whole),
        }
    sys.stdout.write(f"RESULT {json.dumps(alike)}\n")


if __name__ == "__main__":
    _set_torch_accelerator_to_noop()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "eager")
    sys.stdout.flush()
    os._exit(0)  # the process group has nobody to say good-bye to
