from vllm_accel.looping import loops, without_loop


def test_a_text_that_goes_round_loops():
    assert loops([1, 2, 3] * 30)
    assert not loops(list(range(90)))
    assert not loops([1, 2, 3] * 10)  # too short to say


def test_a_loop_is_cut_off_and_nothing_else():
    text = list(range(200))
    assert without_loop(text) == text
    cut = without_loop(text + [7, 8] * 64)
    assert cut[:200] == text
    assert 200 < len(cut) < 260
