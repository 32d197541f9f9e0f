"""Prompts, made tasks and methods of a bench, and what is refused."""

import json
import sys
from types import ModuleType

import pytest

from vllm_accel.bench import methods, prompts, tasks
from vllm_accel.bench.methods import Settings
from vllm_accel.bench.prompts import Prompt
from vllm_accel.errors import ConfigError


class Characters:
    """A tokenizer whose tokens are characters, with a beginning-of-text token 0."""

    vocab_size, all_special_ids = 20, (0, 3)

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join(chr(i) for i in token_ids if i)

    def get_vocab(self):
        words = ["\u0120alpha", "\u2581bravo", "charlie", "delta", "alpha", "xy", "Echo"]
        return {word: i for i, word in enumerate(words)}


def jsonl(tmp_path, *lines):
    file = tmp_path / "p.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")
    return file


# Prompts


def test_prompts_and_first_turns_are_read(tmp_path):
    file = jsonl(tmp_path, {"prompt": "ab"}, "", {"turns": ["cd", "ef"], "category": "x"})
    found = prompts.read(file, Characters().encode)
    assert [p.token_ids for p in found] == [[0, 97, 98], [0, 99, 100]]
    assert [p.name for p in found] == [f"{file}:1", f"{file}:3"]


@pytest.mark.parametrize(
    "line",
    ['{"text": "ab"}', '{"turns": []}', '{"prompt": 3}', '{"prompt": ""}', "[1]", "x"],
)
def test_a_line_without_a_prompt_is_named(tmp_path, line):
    file = jsonl(tmp_path, {"prompt": "ab"}, line)
    with pytest.raises(ConfigError, match=r"p\.jsonl:2 .*expected"):
        prompts.read(file, Characters().encode)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        prompts.lines(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="is empty"):
        prompts.lines(jsonl(tmp_path))


def test_synthetic_prompts_are_the_same_again_and_without_special_tokens():
    found = prompts.synthetic(Characters(), 3)
    assert found == prompts.synthetic(Characters(), 3)
    assert found[0].token_ids != found[1].token_ids
    assert {len(p.token_ids) for p in found} == {prompts.SYNTHETIC_TOKENS}
    used = {token for p in found for token in p.token_ids}
    assert used <= set(range(20)) - {0, 3}


def test_a_prompt_that_leaves_no_room_for_its_answer_is_named():
    chosen = [Prompt("short", [1]), Prompt("long", [1] * 10)]
    prompts.check_lengths(chosen, 6, 16)
    with pytest.raises(ConfigError, match=r"long has 10 tokens .* --max-model-len"):
        prompts.check_lengths(chosen, 7, 16)


def test_rotation_begins_again():
    assert prompts.rotated("abc", 2, 5) == list("cabca")
    assert prompts.batches("abcde", 2) == [["a", "b"], ["c", "d"], ["e"]]


# Tasks


@pytest.mark.parametrize("length", [300, 1000])
def test_made_questions_hold_their_answer_once_and_fit(length):
    tokenizer = Characters()
    found = tasks.made(tokenizer, length, 5)
    assert found == tasks.made(tokenizer, length, 5)
    assert len({q.answer for q in found}) > 1
    for question in found:
        text = tokenizer.decode(question.token_ids)
        name = text.rpartition('REGISTRY["')[2].removesuffix('"] == "')
        assert text.endswith(f'\nassert REGISTRY["{name}"] == "')
        assert text.count(f'REGISTRY["{name}"] = "{question.answer}"\n') == 1
        asked = len(question.token_ids) + question.max_tokens
        assert 0.95 * length <= asked <= length


def test_a_length_without_room_for_a_task_is_refused():
    with pytest.raises(ConfigError, match="too short for a task"):
        tasks.made(Characters(), 40, 1)


def test_a_vocabulary_without_words_is_refused(monkeypatch):
    monkeypatch.setattr(Characters, "get_vocab", lambda self: {"<0x01>": 0})
    with pytest.raises(ConfigError, match="--tasks"):
        tasks.made(Characters(), 300, 1)


@pytest.mark.parametrize(
    ("said", "right"),
    [("123", True), ('123"\n', True), (" 123.", True), ("1234", False), ("12", False)],
)
def test_an_answer_is_right_when_it_is_whole(said, right):
    assert tasks.is_right(tasks.Question([1], "123", 5), said) is right


def test_tasks_of_a_user_are_read(tmp_path):
    file = jsonl(tmp_path, {"prompt": "ab", "answer": " cd\n"})
    assert tasks.read(file, Characters()) == [tasks.Question([0, 97, 98], "cd", 4)]
    with pytest.raises(ConfigError, match=r"p\.jsonl:1 has keys"):
        tasks.read(jsonl(tmp_path, {"prompt": "ab", "answer": 5}), Characters())


# Methods


def config(name, settings):
    return methods.decode_arguments([name], settings)[name].get("speculative_config")


def test_plain_comes_first_whether_named_or_not():
    named = ["ngram", "cerberus", "plain", "ngram"]
    found = methods.decode_arguments(named, Settings("M"))
    assert list(found) == ["plain", "ngram", "cerberus"]
    assert found["plain"] == {}


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'eagle': .*plain, cerberus, free, free-exit"):
        methods.decode_arguments(["eagle"], Settings("M"))


def test_settings_of_cerberus_are_passed_on():
    given = Settings("M", cerberus={"gate": "always"})
    assert config("cerberus", given) == {"method": "cerberus", "gate": "always"}


def write_heads(folder, values):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "place", ["model/vllm_medusa", "model/medusa", "medusa/vllm_medusa", "medusa"]
)
def test_medusa_heads_are_found_in_and_beside_the_model(tmp_path, place):
    folder = write_heads(tmp_path / place, {"num_heads": 3})
    found = config("medusa", Settings(str(tmp_path / "model")))
    assert found == {"method": "medusa", "model": str(folder), "num_speculative_tokens": 3}


def test_of_trained_medusa_heads_those_in_vllms_format_are_taken(tmp_path):
    write_heads(tmp_path / "heads", {"draft_tokens": 3})
    inner = write_heads(tmp_path / "heads" / "vllm_medusa", {"num_heads": 2})
    found = config("medusa", Settings("M", medusa=tmp_path / "heads"))
    assert (found["model"], found["num_speculative_tokens"]) == (str(inner), 2)


@pytest.mark.parametrize("values", [{}, {"num_heads": "many"}, {"medusa_num_heads": 3}])
def test_medusa_without_heads_in_vllms_format_is_refused(tmp_path, values):
    folder = write_heads(tmp_path / "heads", values)
    with pytest.raises(ConfigError, match="--medusa"):
        config("medusa", Settings("M", medusa=folder))


def test_suffix_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "arctic_inference", None)
    with pytest.raises(ConfigError, match="arctic_inference is not installed"):
        config("suffix", Settings("M"))
    library = ModuleType("arctic_inference")
    library.__spec__ = sys.modules["json"].__spec__
    monkeypatch.setitem(sys.modules, "arctic_inference", library)
    assert config("suffix", Settings("M"))["method"] == "suffix"
