"""What free's gate knows of stacks it ended as it wanted."""

import numpy as np
import pytest

from vllm_accel.free.prospect import Prospect


def test_curves_are_the_shares_of_stacks_that_came_so_far():
    prospect = Prospect(3)
    for drafted, stood in [(3, 3), (3, 1), (0, 0), (1, 0)]:
        prospect.learn("a", drafted, stood)
    assert prospect.looked == pytest.approx([1, 0.75, 0.5])
    assert prospect.drafted == pytest.approx([0.75, 0.5, 0.5])
    assert prospect.stood == pytest.approx([0.5, 0.25, 0.25])


def test_old_stacks_fade():
    prospect = Prospect(2)
    for _ in range(200):
        prospect.learn("a", 0, 0)
    for _ in range(60):
        prospect.learn("a", 2, 2)
    assert np.all(prospect.stood > 0.9)


def test_a_request_is_known_by_its_own_stacks_and_a_few_average_ones():
    prospect = Prospect(4)
    for _ in range(50):
        prospect.learn("good", 4, 4)
        prospect.learn("bad", 1, 0)
    assert prospect.favour("new") == 1
    assert prospect.favour("bad") < 0.5 < 1.2 < prospect.favour("good")
    prospect.learn("new", 1, 0)
    assert 0.7 < prospect.favour("new") < 1
    prospect.keep_only({"new"})
    assert prospect.favour("good") == 1
