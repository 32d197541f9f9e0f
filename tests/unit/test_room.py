"""A step scheduled before its drafts were known becomes what it would have been."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm_accel.host.v1 import room
from vllm_accel.speculate import DraftBook

KNOWN = {"a": SimpleNamespace(num_tokens=20), "b": SimpleNamespace(num_tokens=9)}


def scheduled(computed, tokens, spec, resumed=()):
    return SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(computed),
            num_computed_tokens=list(computed.values()),
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=dict(tokens),
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens=dict(spec),
    )


def filled(step, **drafts):
    book = DraftBook()
    for req_id, (position, token_ids) in drafts.items():
        book.note(req_id, position, token_ids)
    room.fill(step, KNOWN, book)
    return step


def test_placeholders_become_the_draft_and_what_stays_empty_is_not_run():
    step = scheduled({"a": 22, "b": 8}, {"a": 5, "b": 5}, {"a": [-1] * 4, "b": [-1] * 4})
    filled(step, a=(20, [7, 8]))
    assert step.scheduled_spec_decode_tokens == {"a": [7, 8]}
    assert step.num_scheduled_tokens == {"a": 3, "b": 1}
    assert step.total_num_scheduled_tokens == 4


def test_a_draft_longer_than_the_room_is_cut():
    step = filled(scheduled({"a": 19}, {"a": 2}, {"a": [-1]}), a=(20, [7, 8]))
    assert step.scheduled_spec_decode_tokens == {"a": [7]}
    assert step.num_scheduled_tokens == {"a": 2}


def test_a_draft_of_another_position_is_none():
    step = filled(scheduled({"a": 19}, {"a": 3}, {"a": [-1, -1]}), a=(19, [7, 8]))
    assert step.scheduled_spec_decode_tokens == {}
    assert step.num_scheduled_tokens == {"a": 1}


def test_drafts_the_scheduler_knew_stay():
    step = filled(scheduled({"a": 19}, {"a": 3}, {"a": [5, 6]}), a=(20, [7, 8]))
    assert step.scheduled_spec_decode_tokens == {"a": [5, 6]}
    assert step.num_scheduled_tokens == {"a": 3}


def test_tokens_taken_for_accepted_are_not_computed():
    """A prompt in chunks, and one that is computed again, are as the scheduler says."""
    step = scheduled({"a": 23, "b": 4}, {"a": 1, "b": 3}, {})
    assert filled(step).scheduled_cached_reqs.num_computed_tokens == [19, 4]
    again = scheduled({"a": 19, "b": 16}, {"a": 1, "b": 1}, {}, resumed=["b"])
    assert filled(again).scheduled_cached_reqs.num_computed_tokens == [19, 16]
