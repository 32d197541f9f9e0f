import numpy as np
import pytest
import torch

from vllm_accel.lazyllm.aux_cache import AuxCache


@pytest.fixture
def aux():
    cache = AuxCache(torch.full((4, 3, 2), torch.nan))
    cache.admit("a", 10, np.array([0, 5, 7, 11]))
    return cache


def rows(*values):
    return torch.tensor([[value, -value] for value in values])


def test_what_was_parked_comes_back_in_the_order_asked_for(aux):
    aux.park("a", np.array([2, 4, 9]), 3, rows(2.0, 4.0, 9.0))
    assert torch.equal(aux.revive("a", np.array([9, 2]), 3), rows(9.0, 2.0))
    assert aux.num_parked("a") == 1


def test_a_token_waits_once(aux):
    aux.park("a", np.array([2]), 3, rows(2.0))
    with pytest.raises(AssertionError, match="wait already"):
        aux.park("a", np.array([2]), 6, rows(2.0))


def test_a_token_is_revived_at_the_layer_it_waits_for_and_moves_deeper(aux):
    aux.park("a", np.array([2]), 3, rows(2.0))
    with pytest.raises(AssertionError, match="not 6"):
        aux.revive("a", np.array([2]), 6)
    aux.revive("a", np.array([2]), 3)
    aux.park("a", np.array([2]), 6, rows(7.0))
    assert torch.equal(aux.revive("a", np.array([2]), 6), rows(7.0))


def test_room_is_the_requests_own_and_used_again(aux):
    for layer in range(1, 9):
        aux.park("a", np.array([1, 2, 3, 4]), layer, rows(1.0, 2.0, 3.0, 4.0))
        aux.revive("a", np.array([1, 2, 3, 4]), layer)
    aux.park("a", np.array([1, 2, 3, 4]), 9, rows(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(AssertionError, match="no room"):
        aux.park("a", np.array([5]), 9, rows(5.0))


def test_requests_do_not_touch_each_others_rows(aux):
    aux.admit("b", 10, np.array([1, 2]))
    aux.park("a", np.array([3, 4]), 3, rows(3.0, 4.0))
    aux.park("b", np.array([3, 4]), 3, rows(5.0, 6.0))
    assert torch.equal(aux.revive("a", np.array([3, 4]), 3), rows(3.0, 4.0))
    assert torch.equal(aux.revive("b", np.array([3, 4]), 3), rows(5.0, 6.0))


def test_a_request_that_ends_leaves_nothing(aux):
    aux.park("a", np.array([2]), 3, rows(2.0))
    aux.forget("a")
    aux.forget("a")
    assert aux.num_requests() == 0
    aux.admit("a", 10, np.array([0]))
    assert aux.num_parked("a") == 0
