"""What our runner tells the drafter of requests, and the scheduler of empty room."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams

from vllm_accel.host.report import Orders
from vllm_accel.host.v1.runner import DraftingRunnerMixin
from vllm_accel.host.v1.scheduler import AccelScheduler

EOS, STOP = 2, 9
ORDERS = Orders(most_drafts=4, keep_drafts=True, measured=[])


def runner(**sampling):
    """With one request of 10 tokens, 4 of them its prompt."""
    params = SamplingParams(max_tokens=100, **sampling)
    params.update_from_generation_config({}, eos_token_id=EOS)
    ours = object.__new__(DraftingRunnerMixin)
    ours.max_model_len = 200
    ours.input_batch = SimpleNamespace(req_ids=["a"], num_tokens_no_spec=[10])
    ours.requests = {"a": SimpleNamespace(sampling_params=params, num_prompt_tokens=4)}
    return ours


@pytest.mark.parametrize(
    ("sampling", "token_ids", "has_room"),
    [
        ({}, [5, 6], True),
        ({}, [5, EOS], False),
        ({"ignore_eos": True}, [5, EOS], True),
        ({"stop_token_ids": [STOP]}, [STOP], False),
    ],
)
def test_a_request_drafts_nothing_behind_its_end(sampling, token_ids, has_room):
    (room,) = runner(**sampling)._rooms([token_ids], ORDERS)
    assert (room > 0) == has_room


@pytest.mark.parametrize(("most", "expected"), [(4, 4), (2, 2), (0, 93)])
def test_no_more_is_drafted_than_the_next_step_has_room_for(most, expected):
    orders = Orders(most_drafts=most, keep_drafts=True, measured=[])
    assert runner()._rooms([[5]], orders) == [expected]


@pytest.mark.parametrize(("empty", "drafted"), [(4, 0), (3, 1), (0, 4)])
def test_empty_room_is_no_draft_in_the_engines_statistics(empty, drafted):
    scheduler = object.__new__(AccelScheduler)
    scheduler.log_stats, scheduler.num_spec_tokens = True, 4
    stats = scheduler.make_spec_decoding_stats(None, 4, 0, {"a": empty}, "a")
    assert (stats is None) == (drafted == 0)
    if stats is not None:
        assert (stats.num_drafts, stats.num_draft_tokens) == (1, drafted)
