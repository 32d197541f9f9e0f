import json

import pytest
import torch
import torch.nn.functional as F

from vllm_accel import ConfigError
from vllm_accel.training import data
from vllm_accel.training.cross_entropy import frozen_linear_cross_entropy
from vllm_accel.training.model import followed_targets, targets


def test_cross_entropy_and_its_gradient_are_torchs():
    torch.manual_seed(0)
    weight, wanted = torch.randn(50, 8), torch.randint(0, 50, (1200,))
    wanted[::7] = data.IGNORED
    ours = torch.randn(1200, 8, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss = frozen_linear_cross_entropy(ours, weight, wanted)
    expected = F.cross_entropy(theirs @ weight.T, wanted)
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_head_i_is_asked_for_the_token_i_plus_two_places_on():
    labels = torch.tensor([[10, 11, 12, 13]])
    assert targets(labels, 0).tolist() == [[12, 13, -100, -100]]
    assert targets(labels, 1).tolist() == [[13, -100, -100, -100]]
    assert targets(labels, -1).tolist() == [[11, 12, 13, -100]]


def test_only_the_continuation_is_a_target(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt_ids": [1, 2], "token_ids": [3, 4]}) + "\n")
    rows = data.read_rows([file], tokenizer=None, row_tokens=3)
    assert rows == [{"input_ids": [2, 3, 4], "labels": [-100, 3, 4]}]


def test_padding_is_no_target():
    batch = data.collate(
        [
            {"input_ids": [1], "labels": [1]},
            {"input_ids": [2, 3], "labels": [2, 3]},
        ]
    )
    assert batch["labels"].tolist() == [[1, -100], [2, 3]]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"token_ids": [1]}', '{"prompt_ids": [1], "token_ids": [0.5, 2]}', "7"],
)
def test_a_broken_line_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt_ids": [1], "token_ids": [2, 3]}\n' + line)
    with pytest.raises(ConfigError, match="line 2 is not a training row"):
        data.read_rows([file], tokenizer=None, row_tokens=8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No training file"):
        data.check_files([tmp_path / "none.txt"])


def test_held_out_rows_are_never_trained_on():
    rows = [{"input_ids": [i], "labels": [i]} for i in range(100)]
    training, held_out = data.split(rows, 10, seed=0)
    assert len(held_out) == 10
    assert {r["labels"][0] for r in training} & {r["labels"][0] for r in held_out} == set()


def test_heads_learn_the_bases_choices_only_along_texts_that_follow_it():
    #                       place  0     1   2   3   4
    said = torch.tensor([[-100, 11, 12, 13, 14]])  # the base's choice for each place
    followed = torch.tensor([[False, True, True, False, True]])
    asked = followed_targets(said, followed, heads=2)
    assert asked[0].tolist() == [[12, 13, -100, -100, -100]]
    assert asked[1].tolist() == [[13, -100, -100, -100, -100]]


def test_the_most_frequent_tokens_come_in_order():
    rows = [{"input_ids": [], "labels": [5, 9, 9, -100, -100, -100, 2, 2, 2]}]
    assert data.most_frequent(rows, 2).tolist() == [2, 9]
