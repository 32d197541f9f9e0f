import numpy as np
import pytest
import torch

from vllm_accel.lazyllm.importance import (
    attention_paid,
    most_important,
    pooled,
    scorer,
    spread,
)


def test_importance_is_attention_of_the_last_row_mean_over_grouped_heads():
    query, keys = torch.randn(4, 8), torch.randn(9, 2, 8)
    heads = [(keys[:, head // 2] @ query[head] * 0.3).softmax(dim=0) for head in range(4)]
    found = attention_paid(query[None], keys, 0.3)
    torch.testing.assert_close(found, torch.stack(heads).mean(dim=0))
    assert found.sum() == pytest.approx(1)


def test_of_several_rows_none_looks_ahead_and_all_count_alike():
    query, keys = torch.randn(3, 4, 8), torch.randn(9, 2, 8)
    alone = [attention_paid(query[i : i + 1], keys[: 7 + i], 0.3) for i in range(3)]
    padded = [torch.nn.functional.pad(found, (0, 9 - len(found))) for found in alone]
    found = attention_paid(query, keys, 0.3)
    torch.testing.assert_close(found, torch.stack(padded).mean(dim=0))


def test_half_precision_is_summed_in_single():
    query, keys = torch.randn(1, 4, 8).bfloat16(), torch.randn(9, 2, 8).bfloat16()
    assert attention_paid(query, keys, 0.3).dtype == torch.float32


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [2.0, 4.5, 7.0]), ("max", [3.0, 6.0, 8.0])]
)
def test_pages_pool_their_tokens_the_last_as_far_as_it_is_filled(pooling, expected):
    values = torch.tensor([1.0, 2.0, 3.0, 3.0, 4.5, 6.0, 6.0, 8.0])
    assert pooled(values, 3, pooling).tolist() == expected


def test_a_neighbour_counts_as_much_as_the_token_looked_at():
    values = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 0.2])
    assert torch.equal(spread(values, 0), values)
    assert spread(values, 1).tolist() == pytest.approx([0.5, 0.5, 0.5, 0.0, 0.2, 0.2])
    assert spread(values, 99).tolist() == [0.5] * 6
    page_by_page = scorer("attention", "mean", 1)(values, 2)
    assert page_by_page.tolist() == pytest.approx([0.5, 0.25, 0.2])


def test_single_tokens_are_pages_of_their_own():
    values = torch.rand(7)
    assert np.array_equal(pooled(values, 1, "mean"), values.numpy())


def test_random_numbers_come_from_a_seed_and_have_nothing_to_do_with_attention():
    one, other = scorer("random", "mean"), scorer("random", "mean")
    first = one(torch.zeros(40), 4)
    assert first.shape == (10,)
    assert np.array_equal(first, other(torch.rand(40), 4))
    assert not np.array_equal(first, one(torch.zeros(40), 4))
    assert scorer("attention", "max")(torch.tensor([1.0, 3.0]), 2).tolist() == [3.0]


def test_what_is_always_kept_comes_first_then_what_matters():
    importance = np.array([0.1, 0.5, 0.2, 0.4, 0.3], dtype=np.float32)
    always = np.array([True, False, False, False, False])
    kept = most_important(importance, always, 3)
    assert np.flatnonzero(kept).tolist() == [0, 1, 3]


def test_of_equals_the_earlier_is_kept():
    kept = most_important(np.ones(6, dtype=np.float32), np.arange(6) == 5, 3)
    assert np.flatnonzero(kept).tolist() == [0, 1, 5]
