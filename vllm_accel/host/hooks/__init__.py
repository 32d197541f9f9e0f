"""Run-time hooks: each a wrap of one vLLM attribute, undone by `remove`."""
