import numpy as np
import pytest
import torch

from vllm_accel import ConfigError
from vllm_accel.spans import (
    Lane,
    Span,
    Stream,
    check_padding,
    group_layers,
    group_size,
    move_rows,
    padding_ratio,
    spans_between,
    table_view,
    view_of,
)
from vllm_accel.toy import ToyDecoder

ROWS = {"a": [3, 1, 7], "b": [2, 5]}


@pytest.fixture
def toy():
    # In double precision: laws of arithmetic are not to hang on the order of sums.
    return ToyDecoder(num_blocks=12).double()


def lane(req_id, first, stop):
    return Lane(req_id, np.arange(first, stop), np.arange(-(-stop // 4)), stop)


def rows_of(toy, *lanes):
    positions = torch.from_numpy(np.concatenate([lane.positions for lane in lanes]))
    return toy.embed(positions * 7 % 64, positions), view_of(lanes, ROWS.get, 4)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_splitting_a_span_changes_nothing(toy, cut):
    stream, view = rows_of(toy, lane("a", 0, 10), lane("b", 0, 7))
    whole = toy.run(Span(0, 4), stream, view)
    cache = toy.kv_cache.clone()
    toy.kv_cache.fill_(torch.nan)
    first, second = Span(0, 4).split(cut)
    halves = toy.run(second, toy.run(first, stream, view), view)
    assert torch.equal(whole.hidden, halves.hidden)
    assert torch.equal(cache.nan_to_num(), toy.kv_cache.nan_to_num())


def test_a_request_in_a_batch_is_what_it_is_alone(toy):
    both = toy.run(Span(0, 4), *rows_of(toy, lane("a", 0, 10), lane("b", 0, 7)))
    alone = toy.run(Span(0, 4), *rows_of(toy, lane("b", 0, 7)))
    torch.testing.assert_close(both.hidden[10:], alone.hidden, rtol=1e-10, atol=1e-10)


def test_a_piece_continues_from_pages_written_before(toy):
    whole = toy.run(Span(0, 4), *rows_of(toy, lane("a", 0, 11)))
    toy.kv_cache.fill_(torch.nan)
    toy.run(Span(0, 4), *rows_of(toy, lane("a", 0, 6)))
    rest = toy.run(Span(0, 4), *rows_of(toy, lane("a", 6, 11)))
    torch.testing.assert_close(whole.hidden[6:], rest.hidden, rtol=1e-10, atol=1e-10)


def test_a_null_page_that_is_read_shows(toy):
    stream, view = rows_of(toy, lane("a", 0, 4))
    toy.run(Span(0, 1), stream, view)
    stream, view = rows_of(toy, lane("a", 4, 5))
    view.block_table[0, 0] = 0
    assert toy.run(Span(0, 1), stream, view).hidden.isnan().all()


def test_the_first_layers_leave_the_others_caches_alone(toy):
    toy.run(Span(0, 2), *rows_of(toy, lane("a", 0, 10)))
    assert not toy.kv_cache[:2, :, [3, 1]].isnan().any()
    assert toy.kv_cache[2:].isnan().all()


def test_what_was_taken_is_put_back_where_it_was():
    stream = Stream(torch.randn(5, 3), torch.tensor([0, 2, 3, 8, 9]))
    rows = torch.tensor([3, 1])
    assert torch.equal(stream.put(rows, stream.take(rows)).hidden, stream.hidden)
    changed = stream.put(rows, Stream(torch.zeros(2, 3), stream.positions[rows]))
    assert changed.hidden.any(dim=1).tolist() == [True, False, True, False, True]
    with pytest.raises(AssertionError, match="moved"):
        stream.put(rows, stream.take(torch.tensor([1, 3])))


def test_a_lane_reads_the_pages_it_sees_and_writes_its_own_slots():
    middle = Lane("a", np.arange(8, 10), np.array([0, 2]), 6)
    view = view_of([lane("b", 0, 5), middle], ROWS.get, 4)
    assert view.query_start_loc.tolist() == [0, 5, 7]
    assert view.seq_lens.tolist() == [5, 6]
    assert view.block_table.tolist() == [[2, 5], [3, 7]]
    assert view.slot_mapping.tolist() == [8, 9, 10, 11, 20, 28, 29]


@pytest.mark.parametrize(
    ("points", "layers", "size", "padding"),
    [
        ((4, 8), 12, 4, 0.0),  # 4, 4, 4
        ((3, 6), 12, 3, 0.0),  # 3, 3, 6
        ((9, 19, 28), 32, 4, 8 / 32),  # the paper's 9, 10, 9, 4
        ((4, 8), 13, 5, 2 / 13),  # 4, 4, 5: vLLM takes the longest, being near
        ((2, 4), 9, 2, 1 / 9),  # 2, 2, 5
    ],
)
def test_groups_are_those_vllm_makes(points, layers, size, padding):
    spans = spans_between(points, layers)
    assert group_size(spans) == size
    assert padding_ratio(spans) == pytest.approx(padding)


def test_a_long_span_is_interleaved_over_its_groups():
    groups = group_layers(spans_between((3, 6), 12))
    assert [list(map(list, group)) for group in groups] == [
        [[0, 1, 2]],
        [[3, 4, 5]],
        [[6, 8, 10], [7, 9, 11]],
    ]


def test_spans_that_waste_memory_are_refused():
    check_padding(spans_between((6, 12), 22))
    with pytest.raises(ConfigError, match=r"9, 10, 9, 4 layers waste 25 %"):
        check_padding(spans_between((9, 19, 28), 32))


def test_a_whole_batch_at_one_go_is_lane_by_lane():
    lanes = [lane("a", 6, 10), lane("b", 4, 5)]
    slow = view_of(lanes, ROWS.get, 4)
    table = np.array([ROWS["a"], [*ROWS["b"], 9]], dtype=np.int32)
    positions = np.concatenate([each.positions for each in lanes])
    fast = table_view(table, np.array([4, 1]), positions, 4)
    for name in ("query_start_loc", "seq_lens", "slot_mapping"):
        assert torch.equal(getattr(fast, name), getattr(slow, name))
    assert fast.block_table[0].tolist() == slow.block_table[0].tolist()


def test_rows_moved_on_are_rows_looked_up_anew():
    table = np.array([[3, 5], [2, 7]], dtype=np.int32)
    ones = np.array([1, 1])
    moved = table_view(table, ones, np.array([2, 5]), 4)
    for positions in ([3, 6], [4, 7]):  # the first comes to its next page
        move_rows(moved, np.array(positions), 4)
        anew = table_view(table, ones, np.array(positions), 4)
        for name in ("query_start_loc", "seq_lens", "slot_mapping", "block_table"):
            assert torch.equal(getattr(moved, name), getattr(anew, name))
