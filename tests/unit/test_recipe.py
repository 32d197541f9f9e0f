"""The reference model's recipe: what its rows and held-out text must be."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

RECIPE = Path(__file__).parents[2] / "examples" / "reference_model"


@pytest.fixture(scope="module", autouse=True)
def recipe_on_path():
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(RECIPE / "weights" / "tokenizer.json"))


@pytest.fixture
def writer(tokenizer):
    from tasks import Names, TaskWriter

    filler = np.tile(np.array(tokenizer.encode("x = f(y)\n").ids, np.uint16), 4000)
    return TaskWriter(tokenizer, filler, Names.of(tokenizer).test)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_question_asks_for_a_value_given_once(writer, tokenizer, length):
    prompt, answer = writer.question(length, 4, np.random.default_rng(length))
    assert len(prompt) == length - 3
    text = tokenizer.decode(prompt.tolist())
    name = text.rpartition('REGISTRY["')[2].partition('"')[0]
    value = tokenizer.decode(answer.tolist())
    assert text.count(f'REGISTRY["{name}"] = "{value}"') == 1
    assert text.endswith(f'assert REGISTRY["{name}"] == "')


def test_rows_mark_the_digits_of_answers_only(writer, tokenizer):
    rng = np.random.default_rng(0)
    rows = [writer.row(512, rng) for _ in range(20)]
    assert all(len(ids) == len(marks) == 512 for ids, marks in rows)
    marked = [ids[marks] for ids, marks in rows if marks.any()]
    assert marked
    for ids in marked:
        assert tokenizer.decode(ids.tolist()).isdigit()


def test_names_asked_in_tests_are_never_trained_on(tokenizer):
    from tasks import Names

    names = Names.of(tokenizer)
    assert not set(names.training) & set(names.test)
    assert min(len(names.training), len(names.test)) > 500


def test_shared_runs_of_tokens_are_found():
    from corpus import GRAM, grams

    ids = np.arange(100, dtype=np.uint16)
    other = np.concatenate([np.full(5, 7, np.uint16), ids[20 : 20 + GRAM]])
    assert np.isin(grams(ids), grams(other)).sum() == 1


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_prompts_are_of_packages_that_were_not_trained_on(kind):
    from corpus import TRAINING

    lines = (RECIPE / "prompts" / f"{kind}.jsonl").read_text().splitlines()
    sources = [json.loads(line)["source"] for line in lines]
    packages = {source.partition("/")[0].partition("-")[0] for source in sources}
    assert len(lines) >= 60
    assert not packages & set(TRAINING)
