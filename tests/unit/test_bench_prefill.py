"""What `bench prefill` measures and scores, on engines that follow a script."""

import pytest

from vllm_accel.bench import methods, prefill
from vllm_accel.bench.methods import Settings
from vllm_accel.bench.prefill import PrefillBench
from vllm_accel.bench.tasks import Question
from vllm_accel.errors import ConfigError
from vllm_accel.lazyllm.config import LazyConfig
from vllm_accel.lazyllm.schedule import Schedule


class ScriptedEngine:
    """The first token after `ttft_s`, the last a second later; right unless told."""

    dtype = "float32"

    def __init__(self, ttft_s, right=lambda token: True, pool=(0.8, 0.8, 0.0)):
        self.ttft_s, self.right, self.pool, self.log = ttft_s, right, list(pool), []
        self.sampling = []

    def run(self, prompts, sampling):
        ((prompt,), (settings,)) = prompts, sampling
        if settings["max_tokens"] == 1:
            self.log.append("strip")
            return [(self.ttft_s, {0: [ord("7")]})]
        self.log.append(prompt[0])
        self.sampling.append(settings)
        answer = [ord("7"), ord('"')] if self.right(prompt[0]) else [ord("8"), ord("8")]
        steps = enumerate([answer[:1], answer[1:], [ord(" ")]])
        return [(self.ttft_s + i / 2, {0: given}) for i, given in steps]

    def held(self):
        return self.pool

    def pages_ratio(self, num_tokens):
        return 1.0

    def pages_run(self):
        return None

    def top2_gap(self, prompt):
        raise AssertionError("nothing is compared here")

    def counters(self):
        return {}

    def rest(self):
        self.log.append("rest")

    def reset_prefix_cache(self):
        self.log.append("reset")


class PruningEngine(ScriptedEngine):
    def pages_ratio(self, num_tokens):
        return num_tokens / 100

    def pages_run(self):
        return {"[0,3)": [1.0, 1.0, 1.0, 1.0], "[3,12)": [1.0, 0.0, 0.02, 0.98]}


class Characters:
    """Tokens are characters."""

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def questions(count, tokens=10):
    return [Question([n] * tokens, "7", 4) for n in range(count)]


def test_rows_say_times_ratios_and_scores():
    dense = ScriptedEngine(0.2)
    quick = PruningEngine(0.1, right=lambda token: token % 2 == 0, pool=(0.8, 0.4, 0.2))
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
    assert (row["lost"], row["won"], row["mcnemar_p"]) == (2, 0, 0.5)
    assert (row["kv_pages_ratio"], row["kv_pages_formula"]) == (0.5, 0.1)
    assert row["strip"] == {"[0,3)": "####", "[3,12)": "#.19"}
    assert row["rows_run"] == {"[0,3)": 1.0, "[3,12)": 0.5}
    assert short[0]["kv_pages_ratio"] == short[0]["kv_pages_formula"] == 1.0
    assert short[0]["strip"] is short[0]["rows_run"] is None
    assert "total_ms" not in row
    assert quick.sampling[0] == {"temperature": 0.0, "max_tokens": 4}


def test_whole_answers_are_timed_where_all_have_as_many_tokens():
    engines = {"dense": ScriptedEngine(3.0), "lazy": ScriptedEngine(1.0)}
    bench = PrefillBench(engines, Characters(), 2, lambda n: None, max_tokens=128)
    (rows,) = bench.rows([questions(4)])
    assert rows[1]["total_ms"]["median"] == pytest.approx(2000)
    assert rows[1]["total_ratio_to_dense"]["median"] == pytest.approx(2)
    assert rows[1]["ratio_to_dense"]["median"] == pytest.approx(3)
    assert engines["lazy"].sampling[0]["max_tokens"] == 128
    assert engines["lazy"].sampling[0]["ignore_eos"]


def test_room_is_made_for_the_longest_prompt_and_its_answer():
    groups = [questions(2), questions(1, tokens=20)]
    assert prefill.longest(groups, None) == 24
    assert prefill.longest(groups, 128) == 148


def test_where_no_pool_is_watched_no_ratio_is_given():
    engines = {"dense": ScriptedEngine(1.0, pool=(0.0, 0.0, 0.0))}
    bench = PrefillBench(engines, Characters(), 1, lambda n: None)
    (rows,) = bench.rows([questions(1)])
    assert rows[0]["kv_pages_ratio"] is None


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (2, 9), (40, 21)])
def test_the_exact_test_is_that_of_a_fair_coin(lost, won):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert prefill.mcnemar_p(lost, won) == pytest.approx(expected)
    assert prefill.mcnemar_p(won, lost) == pytest.approx(expected)


def test_lost_are_those_that_dense_alone_has_right():
    ours, dense = [True, False, False, True], [True, True, True, False]
    assert prefill.lost_and_won(ours, dense) == (2, 1)


def test_every_question_is_asked_once_on_an_empty_prefix_cache_after_a_warm_up():
    dense, other = ScriptedEngine(0.2), ScriptedEngine(0.2)
    bench = PrefillBench({"dense": dense, "x": other}, Characters(), 3, lambda n: None)
    list(bench.rows([questions(5)]))
    rounds = [["strip"], [0], [0, 3], [1, 4], [2]]
    asked = [[part for n in one for part in ("reset", n)] for one in rounds]
    rested = [part for one in asked[1:] for part in [*one, "rest"]]
    assert other.log == asked[0] + rested
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


def test_lazyllm_by_pages_and_by_tokens_side_by_side():
    names = ["lazyllm-page", "lazyllm-token"]
    arguments = methods.prefill_arguments(names, Settings("M", lazyllm={"keep": 0.3}))
    pages, tokens = (
        LazyConfig.from_mapping(arguments[name]["additional_config"]["lazyllm"])
        for name in names
    )
    assert (pages.granularity, pages.keep, pages.revives) == ("page", 0.3, True)
    assert (tokens.granularity, tokens.keep, tokens.revives) == ("token", 0.3, False)
    assert arguments["lazyllm-page"]["block_size"] == methods.LAZY_PAGE
    assert "block_size" not in arguments["lazyllm-token"]


def test_lazyllm_may_be_asked_beside_cerberus():
    arguments = methods.prefill_arguments(["lazyllm-cerberus"], Settings("M"))
    assert arguments["lazyllm-cerberus"]["additional_config"] == {"lazyllm": {}}
    assert arguments["lazyllm-cerberus"]["speculative_config"] == {"method": "cerberus"}


@pytest.mark.parametrize(
    ("given", "last"),
    [
        ({}, LazyConfig().kept),
        ({"granularity": "page"}, 0.1),
        ({"keep": 0.3}, 0.3),
        ({"keep": [0.6, 0.2], "prune_after": [2, 4]}, 0.2),
    ],
)
def test_the_papers_baselines_keep_as_much_as_lazyllm(given, last):
    """Random drop at every point, static pruning in the end; both for good."""
    names = ["lazyllm", "random-drop", "static-prune"]
    arguments = methods.prefill_arguments(names, Settings("M", lazyllm=given))
    lazy, random, static = (
        LazyConfig.from_mapping(arguments[name]["additional_config"]["lazyllm"])
        for name in names
    )
    plans = [
        Schedule.of(config, num_layers=12, block_size=32)
        for config in (lazy, random, static)
    ]
    assert plans[1].keep == plans[0].keep
    assert plans[2].keep == (1.0, last, last)
    assert (random.choose, static.choose) == ("random", "attention")
    assert not random.revives
    assert not static.revives
