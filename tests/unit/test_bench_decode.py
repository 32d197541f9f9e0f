"""What `bench decode` counts, compares and writes, on engines that follow a script."""

import itertools
import statistics

import pytest

from vllm_accel.bench import compare, decode, results
from vllm_accel.bench.decode import DecodeBench, DecodePlan
from vllm_accel.bench.engine import Decoded, tokens_per_s
from vllm_accel.bench.prompts import Prompt
from vllm_accel.errors import ConfigError

LOOPING = 900


class ScriptedEngine:
    """Answers with the prompt's first token, counted up; a prompt of 900s loops.

    Args:
        step_s: seconds of a step, as the clock shows them.
        per_step: tokens of a request and step.
        wrong_at: position of a token it gets wrong.
        log: list that is told of every batch and reset.
    """

    dtype = "bfloat16"

    def __init__(self, step_s=0.1, per_step=1, wrong_at=None, gap=1.0, log=None):
        self.step_s, self.per_step, self.wrong_at = step_s, per_step, wrong_at
        self.gap, self.log = gap, log if log is not None else []
        self.asked_gaps, self.seen = [], []
        self.decisions = 0

    def run(self, prompts, sampling):
        self.log.append((self, len(prompts)))
        self.seen += [(tuple(p), dict(s)) for p, s in zip(prompts, sampling, strict=True)]
        self.decisions += len(prompts)
        answers = [
            self.answer(p, s["max_tokens"]) for p, s in zip(prompts, sampling, strict=True)
        ]
        cuts = [0, *range(1, len(answers[0]), self.per_step), len(answers[0])]
        pairs = list(itertools.pairwise(cuts))
        return [
            (self.step_s * n, {i: a[start:stop] for i, a in enumerate(answers)})
            for n, (start, stop) in enumerate(pairs, 1)
        ]

    def answer(self, prompt, length):
        if prompt[0] >= LOOPING:
            return [7] * length
        said = [prompt[0] + n for n in range(length)]
        if self.wrong_at is not None:
            said[self.wrong_at] = -1
        return said

    def top2_gap(self, prompt):
        self.asked_gaps.append(prompt)
        return self.gap

    def counters(self):
        return {
            "vllm:accel_gate_decisions|open": 3.0 * self.decisions,
            "vllm:accel_gate_decisions|closed": 1.0 * self.decisions,
            "vllm:accel_draft_seconds": 0.01 * self.decisions,
        }

    def rest(self):
        self.log.append((self, "rest"))

    def reset_prefix_cache(self):
        self.log.append((self, "reset"))


def prompts(count, first=0):
    return [Prompt(f"p:{first + n}", [first + n, 5]) for n in range(count)]


def run(engines, plan, chosen):
    told = []
    bench = DecodeBench(engines, plan, told.append)
    rows = [row for of_a_size in bench.rows(chosen) for row in of_a_size]
    return bench, rows, sum(told)


def plan(**changes):
    settings = {"batch_sizes": (2,), "rounds": 3, "max_tokens": 81, "num_prompts": 4}
    return DecodePlan(**settings | changes)


def by_method(rows, prompt_set="not_looping"):
    return {row["method"]: row for row in rows if row["prompts"] == prompt_set}


# What an answer counts


def test_the_decode_clock_runs_while_every_request_decodes():
    steps = [
        (1.0, {0: [1]}),
        (2.0, {0: [2, 3]}),
        (3.0, {0: [4], 1: [9]}),
        (4.0, {0: [5], 1: [8, 7]}),
        (5.0, {1: [6]}),
    ]
    decoded = Decoded.of(steps, 2)
    assert decoded.token_ids == [[1, 2, 3, 4, 5], [9, 8, 7, 6]]
    assert (decoded.tokens, decoded.seconds) == (3, 1.0)
    assert decoded.all_seconds == 2.0
    assert (decoded.later_tokens, decoded.later_steps) == (7, 5)
    assert tokens_per_s([decoded, decoded]) == 3.0


def test_a_ratio_is_over_the_mean_of_both_plains_of_its_round():
    def at(rate):
        return [Decoded([], rate, 1.0, 1.0, 0, 0)]

    one = {"plain": at(90), "cerberus": at(200), "plain_again": at(110)}
    assert decode.ratio_to_plain("cerberus", one) == 2.0
    assert decode.ratio_to_plain("plain_again", one) == pytest.approx(110 / 90)
    assert decode.ratio_to_plain("plain", one) == 1.0


def test_shares_come_from_what_was_counted_in_between():
    names = [f"vllm:accel_gate_decisions|{state}" for state in ("open", "closed")]
    before = {names[0]: 5.0, "vllm:accel_draft_seconds": 1.0}
    after = {names[0]: 8.0, names[1]: 1.0, "vllm:accel_draft_seconds": 1.5}
    shares = decode.counted(before, after, 2.0)
    assert shares["gate_open_share"] == 0.75
    assert shares["draft_cost_share"] == 0.25
    assert set(decode.counted({}, {}, 2.0).values()) == {None}


def test_layers_and_agreement_are_per_token_given():
    before = {"vllm:accel_output_tokens": 50.0}
    after = {
        "vllm:accel_output_tokens": 150.0,
        "vllm:accel_layer_rows": 700.0,
        "vllm:accel_final_tokens": 40.0,
        "vllm:accel_final_agreed_tokens": 37.0,
    }
    shares = decode.counted(before, after, 1.0)
    assert (shares["layers_per_token"], shares["agreement"]) == (7.0, 0.97)
    after["vllm:accel_final_tokens"] = 0.0
    assert decode.counted(before, after, 1.0)["agreement"] is None


# Whole runs


def test_rows_say_rates_ratios_and_steps():
    engines = {"plain": ScriptedEngine(), "cerberus": ScriptedEngine(per_step=2)}
    _, rows, _ = run(engines, plan(), prompts(6))
    found = by_method(rows)
    assert list(found) == ["plain", "cerberus", "plain_again"]
    assert found["plain"]["tokens_per_s"]["median"] == pytest.approx(20)
    assert found["cerberus"]["tokens_per_s"]["median"] == pytest.approx(40)
    assert found["cerberus"]["ratio_to_plain"]["median"] == pytest.approx(2)
    assert found["cerberus"]["tokens_per_step"] == pytest.approx(2)
    assert found["plain"]["tokens_per_step"] == pytest.approx(1)
    assert found["cerberus"]["gate_open_share"] == pytest.approx(0.75)
    assert found["cerberus"]["draft_cost_share"] == pytest.approx(0.01 / 2)
    assert found["plain"]["gate_open_share"] is found["plain"]["draft_cost_share"] is None
    assert found["cerberus"]["identical_tokens"] == 12


def test_methods_take_turns_round_by_round_on_an_empty_prefix_cache():
    log = []
    plain, ours = ScriptedEngine(log=log), ScriptedEngine(log=log)
    chosen = plan(prompt_sets=("all",), rounds=2)
    run({"plain": plain, "ngram": ours}, chosen, prompts(4))

    def batches(engine, count):
        return [(engine, "reset"), (engine, 2)] * count

    def one_round(count):
        return [
            part
            for engine in (plain, ours, plain)
            for part in [*batches(engine, count), (engine, "rest")]
        ]

    looked_for_loops = [*batches(plain, 2), (plain, "rest")]
    assert log == looked_for_loops + one_round(1) + one_round(2) * 2


def test_each_round_has_other_prompts_and_the_first_come_again():
    engine = ScriptedEngine()
    run({"plain": engine}, plan(prompt_sets=("all",)), prompts(6))
    seen = [prompt[0] for prompt, _ in engine.seen]
    timed = seen[6 + 2 * 2 :]  # after the look for loops and the warm-up
    rounds = [timed[i : i + 4] for i in range(0, len(timed), 8)]  # plain, plain again
    assert rounds == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


def test_progress_counts_every_answer_that_was_announced():
    chosen = plan(batch_sizes=(1, 3), num_prompts=None)
    engines = {"plain": ScriptedEngine(), "cerberus": ScriptedEngine()}
    _, _, told = run(engines, chosen, prompts(7))
    assert told == chosen.answers(7, 3)


def test_a_round_is_made_of_whole_batches():
    chosen = DecodePlan()
    sizes = [chosen.prompts_per_round(n) for n in (1, 8, 12, 64)]
    assert sizes == [12, 16, 12, 64]
    assert DecodePlan(num_prompts=5).prompts_per_round(4) == 8


def test_looping_prompts_are_timed_apart():
    mixed = [*prompts(2), *prompts(2, LOOPING)]
    engine = ScriptedEngine()
    _, rows, _ = run({"plain": engine}, plan(), mixed)
    assert by_method(rows)["plain"]["looping_share"] == 0
    assert by_method(rows, "all")["plain"]["looping_share"] == 0.5
    asked_in_not_looping = engine.seen[4 + 4 : 4 + 4 + 3 * 2 * 4]
    assert {prompt[0] for prompt, _ in asked_in_not_looping} == {0, 1}


def test_when_everything_loops_there_are_no_rows_without_loops(caplog):
    looping = prompts(3, LOOPING)
    _, rows, _ = run({"plain": ScriptedEngine()}, plan(), looping)
    assert {row["prompts"] for row in rows} == {"all"}
    assert "all prompts loop" in caplog.text
    with pytest.raises(ConfigError, match="--prompt-sets all"):
        run({"plain": ScriptedEngine()}, plan(prompt_sets=("not_looping",)), looping)


def test_short_answers_are_said_to_hide_loops(caplog):
    short = plan(max_tokens=16)
    _, rows, _ = run({"plain": ScriptedEngine()}, short, prompts(3, LOOPING))
    assert "too short to tell loops" in caplog.text
    assert by_method(rows)["plain"]["looping_share"] == 0


def test_wide_gaps_are_differences_and_narrow_ones_ties():
    for gap, ties, differences in ((1.0, 0, 12), (0.01, 12, 0)):
        plain = ScriptedEngine(gap=gap)
        engines = {"plain": plain, "ngram": ScriptedEngine(wrong_at=3)}
        bench, rows, _ = run(engines, plan(prompt_sets=("all",)), prompts(6))
        row = by_method(rows, "all")["ngram"]
        assert (row["identical_tokens"], row["ties"]) == (0, ties)
        assert row["differences"] == differences == len(bench.differences)
        assert plain.asked_gaps[0] == [0, 5, 0, 1, 2]
        assert len(plain.asked_gaps) == 6, "the same place is asked once"


def test_a_difference_says_where_it_is():
    engines = {"plain": ScriptedEngine(), "ngram": ScriptedEngine(wrong_at=3)}
    bench, _, _ = run(engines, plan(rounds=1, prompt_sets=("all",)), prompts(4))
    method, batch_size, difference = bench.differences[1]
    assert (method, batch_size) == ("ngram", 2)
    assert str(difference).startswith("p:1: token 3 is -1, plain's 4; ")


def test_a_method_that_may_say_something_else_is_not_a_failure():
    engines = {"plain": ScriptedEngine(), "free-exit": ScriptedEngine(wrong_at=3)}
    bench, rows, _ = run(engines, plan(prompt_sets=("all",)), prompts(6))
    row = by_method(rows, "all")["free-exit"]
    keys = ("identical_tokens", "ties", "differences")
    assert [row[key] for key in keys] == [0, None, None]
    assert not bench.differences


def test_greedy_requests_never_end_early():
    engine = ScriptedEngine()
    run({"plain": engine}, plan(rounds=1), prompts(4))
    greedy = {"temperature": 0.0, "max_tokens": 81, "ignore_eos": True}
    assert all(sampling == greedy for _, sampling in engine.seen)


def test_above_temperature_zero_tokens_are_not_compared():
    plain, ours = ScriptedEngine(), ScriptedEngine(wrong_at=3)
    chosen = plan(temperature=0.7, prompt_sets=("all",))
    bench, rows, _ = run({"plain": plain, "ngram": ours}, chosen, prompts(12))
    row = by_method(rows, "all")["ngram"]
    keys = ("identical_tokens", "ties", "differences")
    assert [row[key] for key in keys] == [None, None, None]
    assert not bench.differences
    assert {sampling["temperature"] for _, sampling in ours.seen} == {0.7}


# Comparing


def test_the_first_difference_may_be_an_end():
    assert compare.first_difference([1, 2], [1, 2]) is None
    assert compare.first_difference([1, 2], [1, 3]) == 1
    assert compare.first_difference([1, 2], [1, 2, 3]) == 2


def test_what_ties_depends_on_the_dtype():
    assert compare.tie_below("float32") == 1e-4
    assert compare.tie_below("bfloat16") == compare.tie_below("float16") == 2e-2


# Writing


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "new" / "out.json"
    content = results.document(["vllm-accel", "bench"], "cpu")
    content["rows"] = [{"method": "plain"}]
    results.write(file, content)
    assert results.load(file) == content
    broken = content | {"rows": [object()]}
    with pytest.raises(TypeError):
        results.write(file, broken)
    assert results.load(file) == content
    assert [f.name for f in file.parent.iterdir()] == ["out.json"]


def test_a_document_says_where_and_with_what():
    content = results.document(["a", "b"], "cpu")
    assert set(content) == {"machine", "versions", "command", "date", "rows"}
    assert set(content["versions"]) == {"vllm", "torch", "vllm_accel", "python"}
    keys = {"cpu", "instructions", "cores", "memory_gib", "platform", "device"}
    assert set(content["machine"]) == keys
    assert content["machine"]["cores"] >= 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        results.load(tmp_path / "x.json")


def test_a_spread_is_least_median_most():
    values = [3.0, 1.0, 2.0, 10.0]
    spread = results.spread(values)
    assert spread == {"min": 1.0, "median": statistics.median(values), "max": 10.0}
