"""LazyLLM on Model Runner V1: spans as KV-cache groups, pruning prefills, revival."""
