"""For tests that run beside each other (`pytest -n`)."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker, and for the engines it starts.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
