"""Who may have final drafts, and what the sampler is shown of them."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_accel.host.v1 import final


def test_a_row_with_a_draft_allows_nothing_else():
    logits = torch.randn(5, 7)
    shown = final.only_drafts(logits, torch.tensor([1, 2]), torch.tensor([3, 6]))
    assert shown.argmax(dim=-1)[[1, 2]].tolist() == [3, 6]
    assert shown.softmax(dim=-1)[1, 3] == 1
    assert torch.equal(shown[[0, 3, 4]], logits[[0, 3, 4]])


def test_drafts_stand_up_to_the_first_surprise_of_each_request():
    logits = torch.zeros(7, 4)
    logits[[1, 2, 4, 5], [0, 1, 2, 3]] = 9.0
    rows, token_ids = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 3, 1, 2, 3])
    all_final = [[], [True] * 3, [True] * 2]
    stands = final.standing(logits, rows, token_ids, all_final, 2.0)
    assert stands.tolist() == [True, False, False, True, True]
    assert final.standing(logits, rows, token_ids, all_final, None).all()
    some = [[], [False, True, True], [True, False]]
    stands = final.standing(logits, rows, token_ids, some, None)
    assert stands.tolist() == [False, True, True, True, False]


def test_a_request_is_given_its_drafts_as_far_as_they_stand_and_a_deep_choice():
    deep = [[7], [1, 2, 3, 4], [5, 6, 8]]
    stand = [True, False, False, True, True]
    sampled = final.sampled(deep, [10, 11, 12, 13, 14], stand, [0, 3, 2])
    assert sampled.tolist() == [[7, -1, -1, -1], [10, 2, -1, -1], [13, 14, 8, -1]]


def test_a_draft_that_is_not_final_is_kept_where_the_deep_choice_is_the_same():
    deep = [[1, 2, 3, 4], [5, 6]]
    drafts, stand = [1, 9, 9, 7], [False, True, False, False]
    sampled = final.sampled(deep, drafts, stand, [3, 1])
    assert sampled.tolist() == [[1, 9, 3, -1], [5, -1, -1, -1]]


def test_a_plainly_greedy_request_may():
    assert final.allowed(SamplingParams(temperature=0, max_tokens=9, stop=["x"]))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"logprobs": 1},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"allowed_token_ids": [1, 2]},
        {"bad_words": ["no"]},
        {"logit_bias": {1: 2.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"extra_args": {"early_exit": False}},
        {"extra_args": {"early_exit": "false"}},
        {"extra_args": {"early_exit": 0}},
    ],
)
def test_any_other_request_goes_through_all_layers(params):
    assert not final.allowed(SamplingParams(**({"temperature": 0} | params)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 0.99),
        (None, 0.99),
        ({"exit_quality": 0.9}, 0.9),
        ({"exit_quality": "0.9"}, 0.9),
        ({"exit_quality": 0.91234}, 0.912),
        ({"exit_quality": 7}, 1.0),
        ({"exit_quality": "x"}, 1.0),
    ],
)
def test_a_request_may_ask_for_another_share(asked, expected):
    params = SamplingParams(temperature=0, extra_args=asked)
    assert final.quality(params, 0.99) == expected
