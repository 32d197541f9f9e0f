"""Replicas on Ray: a Serve app behind an OpenAI endpoint, and batches on Ray Data.

The only package that imports ray, and only when something is built: `import
vllm_accel.ray` works without the extra.
"""

from vllm_accel.ray.app import build_app, serve_app

__all__ = ["build_app", "serve_app"]
