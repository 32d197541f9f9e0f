"""The books of a batch: what is read, what is done, what becomes the output."""

import json

import pytest

pytest.importorskip("pyarrow")

from pyarrow import parquet

from vllm_accel import ConfigError
from vllm_accel.ray import rows
from vllm_accel.ray.rows import Outcome, Parts, book_of, read_prompts, waiting


class Letters:
    """A tokenizer: a letter a token, 1 before a prompt, and a chat template."""

    def encode(self, text, *, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<bot>"


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        file = tmp_path / "in.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("\n".join(texts) + "\n")
        return file

    return write


def read(file, **sampling):
    return read_prompts(file, Letters(), sampling)


def outcome(row, error=""):
    return Outcome(row, f"text {row}", [row, row], 3, 2, error)


def prompts(number):
    return [rows.Prompt(row, f"prompt {row}", [row], {}) for row in range(number)]


def test_prompts_messages_and_their_sampling(written):
    chat = [{"role": "user", "content": "b"}]
    file = written(
        {"prompt": "a"}, "", {"messages": chat, "sampling_params": {"max_tokens": 3}}
    )
    first, second = read(file, max_tokens=9, temperature=0.0)
    assert (first.row, first.text, first.token_ids) == (0, "a", [1, ord("a")])
    assert first.sampling == {"max_tokens": 9, "temperature": 0.0}
    assert (second.row, json.loads(second.text)) == (1, chat)
    assert second.token_ids == [ord(letter) for letter in "<user>b<bot>"]
    assert second.sampling == {"max_tokens": 3, "temperature": 0.0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ({}, "has the keys none"),
        ({"prompt": ""}, "a text that is not empty"),
        ({"prompt": 3}, "has the keys prompt"),
        ({"messages": []}, "has the keys messages"),
        ({"prompt": "a", "messages": [{}]}, "expected either"),
        ({"prompt": "a", "sampling_params": 3}, "expected an object"),
        ({"messages": [{"content": "a"}]}, "does not go through"),
    ],
)
def test_a_bad_line_is_named(written, line, said):
    file = written({"prompt": "a"}, line)
    with pytest.raises(ConfigError, match=said) as refusal:
        read(file)
    assert f"{file}:2" in str(refusal.value)


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        ({}, {"ignore_eos": True}, "ignore_eos"),
        ({"extra_args": {"a": 1}}, {"extra_args": {"b": 1}}, "extra_args.a, extra_args.b"),
    ],
)
def test_lines_that_set_different_things_are_refused(written, first, second, differs):
    lines = [{"prompt": "a", "sampling_params": own} for own in (first, first, second)]
    with pytest.raises(ConfigError, match=f"in.jsonl:3 has other keys.*{differs}"):
        read(written(*lines), max_tokens=9)


def test_a_line_may_set_what_the_command_sets(written):
    lines = [{"prompt": "a"}, {"prompt": "a", "sampling_params": {"max_tokens": 3}}]
    assert [p.sampling["max_tokens"] for p in read(written(*lines), max_tokens=9)] == [9, 3]


def test_a_batch_becomes_one_file_in_the_order_of_its_input(tmp_path):
    output = tmp_path / "new" / "out.parquet"
    parts = Parts(output, {"input": "x"})
    parts.add([outcome(2), outcome(0)])
    parts.add([outcome(1, error="ValueError: too long")])
    assert not output.exists()
    assert parts.finish(prompts(3)) == 1
    assert list(output.parent.iterdir()) == [output]
    table = parquet.read_table(output).to_pylist()
    assert [row["row"] for row in table] == [0, 1, 2]
    assert [row["prompt"] for row in table] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [row["text"] for row in table] == ["text 0", "text 1", "text 2"]
    assert table[2]["token_ids"] == [2, 2]
    assert [row["error"] for row in table] == ["", "ValueError: too long", ""]


def test_a_stopped_batch_goes_on_with_what_is_missing(tmp_path):
    output, book = tmp_path / "out.parquet", {"input": "x", "model": "m"}
    Parts(output, book).add([outcome(1), outcome(3)])
    again = Parts(output, book)
    assert again.done == {1, 3}
    assert [p.row for p in waiting(prompts(5), again.done)] == [0, 2, 4]
    again.add([outcome(0), outcome(2), outcome(4)])
    assert again.finish(prompts(5)) == 0
    table = parquet.read_table(output)
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]


def test_a_row_that_comes_twice_is_kept_once(tmp_path):
    parts = Parts(tmp_path / "out.parquet", {})
    parts.add([outcome(0), outcome(0)])
    parts.add([outcome(0), outcome(1)])
    assert parts.finish(prompts(2)) == 0
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 2


def test_a_part_that_was_being_written_does_not_count(tmp_path):
    output = tmp_path / "out.parquet"
    Parts(output, {}).add([outcome(0)])
    (tmp_path / "out.parquet.parts" / "part-000002.parquet.partial").write_bytes(b"PAR")
    assert Parts(output, {}).done == {0}


def test_a_batch_without_an_answer_may_be_corrected(tmp_path):
    output = tmp_path / "out.parquet"
    Parts(output, {"model": "wrong"})
    Parts(output, {"model": "right"}).add([outcome(0)])
    assert Parts(output, {"model": "right"}).done == {0}


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Parts(tmp_path / "file" / "out.parquet", {})


def test_another_batch_is_not_gone_on_with(tmp_path):
    begun = Parts(tmp_path / "out.parquet", {"input": "x", "model": "m", "sampling": {}})
    begun.add([outcome(0)])
    with pytest.raises(ConfigError, match=r"another batch \(other input, model\)"):
        Parts(tmp_path / "out.parquet", {"input": "y", "model": "n", "sampling": {}})


def test_an_output_that_is_complete_is_not_written_over(tmp_path):
    (tmp_path / "out.parquet").touch()
    with pytest.raises(ConfigError, match="exists already"):
        rows.check_new(tmp_path / "out.parquet")


def test_the_book_knows_the_inputs_content(written, tmp_path):
    one = book_of(written({"prompt": "a"}), {"sampling": {"max_tokens": 1}})
    assert one == book_of(written({"prompt": "a"}), {"sampling": {"max_tokens": 1}})
    assert one != book_of(written({"prompt": "b"}), {"sampling": {"max_tokens": 1}})
    assert json.loads(json.dumps(one)) == one
