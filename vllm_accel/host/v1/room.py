"""Filling the room a step has for drafts, where they are known: in the worker.

A step that is queued ahead is scheduled before its drafts are made and before the ones
ahead of it are verified. Its requests come with placeholders for the longest draft, and
with counts that take every draft of the step in flight for accepted, as vLLM's
asynchronous scheduling has it (vllm/v1/core/sched/async_scheduler.py, 0.32).
"""

from collections.abc import Mapping
from typing import Any

from vllm_accel.speculate import DraftBook


def fill(scheduler_output: Any, requests: Mapping[str, Any], book: DraftBook) -> None:
    """Makes a step what it would be had it waited; one that did stays as it is.

    The step is changed in place: it is this process's own copy wherever steps are queued.

    Args:
        requests: the runner's books, exact up to the step before.
        book: drafts that wait for their verdict.
    """
    _correct_counts(scheduler_output.scheduled_cached_reqs, requests)
    spec = scheduler_output.scheduled_spec_decode_tokens
    for req_id, token_ids in list(spec.items()):
        if token_ids[0] >= 0:
            continue  # came from the scheduler
        draft = book.draft(req_id, requests[req_id].num_tokens)[: len(token_ids)]
        empty = len(token_ids) - len(draft)
        scheduler_output.num_scheduled_tokens[req_id] -= empty
        scheduler_output.total_num_scheduled_tokens -= empty
        if draft:
            spec[req_id] = list(draft)
        else:
            del spec[req_id]


def _correct_counts(cached: Any, requests: Mapping[str, Any]) -> None:
    """All tokens but the last one sampled are computed, at most."""
    for i, req_id in enumerate(cached.req_ids):
        if req_id not in cached.resumed_req_ids:
            known = requests[req_id].num_tokens - 1
            cached.num_computed_tokens[i] = min(cached.num_computed_tokens[i], known)
