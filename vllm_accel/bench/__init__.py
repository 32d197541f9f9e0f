"""`vllm-accel bench`: methods side by side in one run, as JSON and as a page."""
