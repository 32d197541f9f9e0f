"""Requests with a seed whose prompt is read in chunks, on CPU.

For every chunk vLLM samples a token, discards it, and sets the request's generator back
by an offset. CPU generators have none, and the engine dies.
"""

from typing import Any


class SeededChunksMixin:
    """Overrides of GPUModelRunner (vllm/v1/worker/gpu_model_runner.py, 0.32)."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Samples what is discarded without the request's generator, which stays put."""
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np
        kept = {i: generators.pop(i) for i in list(generators) if discarded[i]}
        output = super().sample_tokens(grammar_output)
        generators.update(kept)
        return output


def keep_seeds(runner: Any) -> None:
    """Gives one runner the override, whatever class it is of; once."""
    if isinstance(runner, SeededChunksMixin):
        return
    runner.__class__ = type(
        f"Seeded{type(runner).__name__}",
        (SeededChunksMixin, type(runner)),
        {"__module__": __name__},
    )
