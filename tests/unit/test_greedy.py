from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm_accel.host.v1 import greedy


def test_accepted_drafts_and_one_token_of_the_targets():
    best = torch.tensor([1, 2, 3, 9, 5, 7, 8])
    drafts = torch.tensor([1, 2, 4, 8])
    # Request 0 drafted [1, 2, 4]: two right. Request 1 nothing. Request 2 drafted [8].
    sampled = greedy.verified(best, drafts, [3, 0, 1])
    assert sampled.tolist() == [[1, 2, 3, -1], [5, -1, -1, -1], [7, -1, -1, -1]]


def test_a_whole_draft_is_followed_by_the_bonus_token():
    sampled = greedy.verified(torch.tensor([4, 5, 6]), torch.tensor([4, 5]), [2])
    assert sampled.tolist() == [[4, 5, 6]]


PLAIN = {
    "all_greedy": True,
    "max_num_logprobs": None,
    "logprob_token_ids": None,
    "no_penalties": True,
    "bad_words_token_ids": {},
    "allowed_token_ids_mask": None,
    "thinking_budget_state_holder": None,
    "logitsprocs": SimpleNamespace(non_argmax_invariant=[]),
}


def test_a_plain_batch_is_plain():
    assert greedy.is_plain(SimpleNamespace(**PLAIN))


@pytest.mark.parametrize(
    "change",
    [
        {"all_greedy": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [1]}},
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.ones(1, 4, dtype=torch.bool)},
        {"logitsprocs": SimpleNamespace(non_argmax_invariant=[object()])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whoever_edits_or_asks_for_logits_is_not_plain(change):
    assert not greedy.is_plain(SimpleNamespace(**PLAIN | change))
