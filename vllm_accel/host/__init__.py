"""The only place that imports vllm: adapters without arithmetic."""
