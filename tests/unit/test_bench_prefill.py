"""What `bench prefill` measures and scores, on engines that follow a script."""

import pytest

from vllm_accel.bench import methods, prefill
from vllm_accel.bench.methods import Settings
from vllm_accel.bench.prefill import PrefillBench
from vllm_accel.bench.tasks import Question
from vllm_accel.errors import ConfigError


class ScriptedEngine:
    """The first token after `ttft_s`; right about prompts of even ids unless told."""

    dtype = "float32"

    def __init__(self, ttft_s, right=lambda token: True):
        self.ttft_s, self.right, self.log = ttft_s, right, []

    def run(self, prompts, sampling):
        ((prompt,), (settings,)) = prompts, sampling
        self.log.append(prompt[0])
        assert settings == {"temperature": 0.0, "max_tokens": 4}
        answer = [ord("7"), ord('"')] if self.right(prompt[0]) else [ord("8")]
        return [(self.ttft_s, {0: answer[:1]}), (9.0, {0: answer[1:]})]

    def top2_gap(self, prompt):
        raise AssertionError("nothing is compared here")

    def counters(self):
        return {}

    def rest(self):
        self.log.append("rest")

    def reset_prefix_cache(self):
        self.log.append("reset")


class Characters:
    """Tokens are characters."""

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def questions(count, tokens=10):
    return [Question([n] * tokens, "7", 4) for n in range(count)]


def test_rows_say_times_ratios_and_scores():
    dense = ScriptedEngine(0.2)
    quick = ScriptedEngine(0.1, right=lambda token: token % 2 == 0)
    told = []
    engines = {"dense": dense, "lazy": quick}
    bench = PrefillBench(engines, Characters(), 2, told.append)
    groups = [questions(4), questions(4, tokens=20)]
    short, long = bench.rows(groups)
    assert sum(told) == prefill.answers(groups, 3)
    assert [row["method"] for row in short] == ["dense", "lazy", "dense_again"]
    assert [row["prompt_length"] for row in short + long] == [10] * 3 + [20] * 3
    row = short[1]
    assert row["ttft_ms"]["median"] == pytest.approx(100)
    assert row["ratio_to_dense"]["median"] == pytest.approx(2)
    assert (row["score"], row["score_dense"], row["n"]) == (0.5, 1.0, 4)
    assert row["kv_pages_ratio"] is None
    assert short[0]["kv_pages_ratio"] == 1.0


def test_every_question_is_asked_once_on_an_empty_prefix_cache_after_a_warm_up():
    dense, other = ScriptedEngine(0.2), ScriptedEngine(0.2)
    bench = PrefillBench({"dense": dense, "x": other}, Characters(), 3, lambda n: None)
    list(bench.rows([questions(5)]))
    rounds = [[0], [0, 3], [1, 4], [2]]
    asked = [[part for n in tokens for part in ("reset", n)] for tokens in rounds]
    assert other.log == [part for one in asked for part in [*one, "rest"]]
    assert len(dense.log) == 2 * len(other.log)


def test_a_round_needs_a_question():
    prefill.check_rounds(5, 5)
    with pytest.raises(ConfigError, match="4 questions for 5 rounds"):
        prefill.check_rounds(4, 5)


def test_methods_are_arguments_of_engines_dense_first():
    settings = Settings("M", lazyllm={"keep": 0.3})
    arguments = methods.prefill_arguments(["lazyllm", "dense-whole"], settings)
    assert list(arguments) == ["dense", "lazyllm", "dense-whole"]
    assert arguments["dense"] == {}
    assert arguments["lazyllm"]["additional_config"] == {"lazyllm": {"keep": 0.3}}
