"""The command line of a bench: options, refusals, whole commands."""

import json
import subprocess
import sys

import pytest

from vllm_accel.bench import cli
from vllm_accel.cli import main, parser

# Options and refusals


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vllm_accel.cli", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def refused(*arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def decode_arguments(tmp_path, *more):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x"}) + "\n")
    return ["decode", "--model", "M", "--prompts", file, "--output", "o.json", *more]


def test_help_of_a_bench_is_light():
    code = "import sys\nfrom vllm_accel.cli import main\n"
    code += "try: main(['bench', 'decode', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'vllm', 'matplotlib', 'tqdm', 'jinja2'}\n"
    code += "print(sys.modules.keys() & heavy)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_options_have_the_defaults_they_name():
    arguments = ["decode", "--model", "M", "--synthetic", "--output", "o.json"]
    options = parser().parse_args(["bench", *arguments])
    assert options.methods == ["plain", "cerberus", "ngram"]
    assert options.batch_sizes == [1, 2, 4, 8, 16, 32, 64]
    assert (options.rounds, options.max_tokens, options.temperature) == (5, 128, 0)
    assert options.kv_cache_memory_bytes == 268435456
    arguments = ["prefill", "--model", "M", "--output", "o.json"]
    options = parser().parse_args(["bench", *arguments])
    assert options.prompt_lengths == [1024, 4096, 8192]
    assert options.questions == 24


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--batch-sizes", "1,0", "out of range"),
        ("--batch-sizes", "1,x", "invalid"),
        ("--max-tokens", "1", "out of range"),
        ("--temperature", "-1", "out of range"),
        ("--temperature", "nan", "out of range"),
        ("--cerberus", "[1]", "no JSON object"),
        ("--free", "3", "no JSON object"),
    ],
)
def test_values_that_make_no_bench_are_refused(capsys, option, value, said):
    arguments = ["decode", "--model", "M", "--synthetic", "--output", "o.json"]
    with pytest.raises(SystemExit):
        main(["bench", *arguments, f"{option}={value}"])
    error = capsys.readouterr().err
    assert f"argument {option}: " in error
    assert said in error


def test_prompts_are_asked_for_one_way_or_the_other(capsys):
    for more in ([], ["--synthetic", "--prompts", "p"]):
        with pytest.raises(SystemExit):
            main(["bench", "decode", "--model", "M", "--output", "o.json", *more])
        assert "--prompts" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_an_engine_starts(tmp_path):
    assert "'eagle'" in refused(*decode_arguments(tmp_path, "--methods", "eagle"))
    assert "--prompt-sets" in refused(*decode_arguments(tmp_path, "--prompt-sets", "a"))
    missing = ["--prompts", tmp_path / "none.jsonl"]
    assert "none.jsonl" in refused(*decode_arguments(tmp_path, *missing))
    arguments = ["prefill", "--model", "M", "--output", "o.json", "--methods", "lazy"]
    assert "'lazy'" in refused(*arguments)
    assert "x.json" in refused("report", tmp_path / "x.json", "--html", "r.html")


@pytest.mark.parametrize(
    ("missing", "command"),
    [("tqdm", "decode"), ("matplotlib", "report"), ("jinja2", "report")],
)
def test_a_bench_without_its_extra_says_which_to_install(tmp_path, missing, command):
    # None in sys.modules is how Python marks a module that cannot be imported.
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "from vllm_accel.cli import main; sys.exit(main())"
    arguments = {
        "decode": decode_arguments(tmp_path),
        "report": ["report", "x.json", "--html", "r.html"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"needs {missing}" in done.stderr
    assert "pip install 'vllm-accel[bench]'" in done.stderr


# Whole commands, with engines that follow a script


class ScriptedHost:
    """Takes the place of `host/engines.py`; engines answer with 1, 2, 3 and so on.

    Those of a speculative method answer two tokens a step, with 0 for `wrong`'s.
    """

    def __init__(self, wrong=()):
        self.wrong, self.engines = wrong, []

    def tokenizer(self, model):
        return self

    def device_name(self):
        return "paper"

    def Engine(self, **arguments):
        self.engines.append(ScriptedEngine(arguments, self.wrong))
        return self.engines[-1]

    vocab_size, all_special_ids = 50, (0,)

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


class ScriptedEngine:
    """One engine of a ScriptedHost."""

    dtype = "bfloat16"

    def __init__(self, arguments, wrong):
        self.arguments, self.closed = arguments, False
        self.method = arguments.get("speculative_config", {}).get("method", "plain")
        self.first = 0 if self.method in wrong else 1

    def run(self, prompts, sampling):
        per_step, length = (1 if self.method == "plain" else 2), sampling[0]["max_tokens"]
        said = [self.first, *range(2, length + 1)]
        starts = range(0, length, per_step)
        cuts = [said[start : start + per_step] for start in starts]
        return [
            (0.1 * n, dict.fromkeys(range(len(prompts)), c)) for n, c in enumerate(cuts, 1)
        ]

    def top2_gap(self, prompt):
        return 1.0

    def counters(self):
        return {}

    def held(self):
        return [0.5]

    def pages_ratio(self, num_tokens):
        return 1.0

    def pages_run(self):
        return None

    def rest(self):
        pass

    def reset_prefix_cache(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a bench command on a scripted host; gives exit code, file and host."""

    def run_bench(kind, *more, wrong=()):
        host = ScriptedHost(wrong)
        monkeypatch.setattr(cli, "_host", lambda: host)
        monkeypatch.setattr(cli, "_with_preloads", lambda: None)
        output = tmp_path / "out.json"
        arguments = ["bench", kind, "--model", "M", "--output", str(output), *more]
        code = main(list(map(str, arguments)))
        return code, json.loads(output.read_text()), host

    return run_bench


DECODE = ["--methods", "ngram", "--batch-sizes", "2,1", "--synthetic", "--rounds", "2"]


def test_a_decode_bench_boots_runs_writes_and_closes(bench, capsys):
    code, content, host = bench("decode", *DECODE, "--max-tokens", "9")
    assert code == 0
    assert content["machine"]["device"] == "paper"
    methods = [row["method"] for row in content["rows"]]
    assert methods == ["plain", "ngram", "plain_again"] * 4
    assert [row["batch_size"] for row in content["rows"]] == [1] * 6 + [2] * 6
    assert [row["prompts"] for row in content["rows"][::3]] == ["not_looping", "all"] * 2
    assert all(engine.closed for engine in host.engines)
    plain, ngram = (engine.arguments for engine in host.engines)
    assert ngram.pop("speculative_config")["method"] == "ngram"
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28}
    sizes["dtype"] = "auto"
    assert plain == ngram == {"model": "M"} | sizes
    assert capsys.readouterr().out.splitlines()[0].startswith("method ")


def test_a_decode_bench_with_differences_names_them_and_exits_with_one(bench, capsys):
    code, content, _ = bench("decode", *DECODE, wrong=("ngram",))
    assert code == 1
    assert all(row["differences"] for row in content["rows"] if row["method"] == "ngram")
    said = capsys.readouterr().out
    assert "DIFFERENCE ngram, batch size 1, synthetic:1: token 0 is 0, plain's 1" in said


def test_a_prefill_bench_boots_runs_writes_and_closes(bench, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "abc", "answer": "x"}\n' * 3)
    code, content, host = bench("prefill", "--tasks", tasks, "--rounds", "3")
    assert code == 0
    assert [row["method"] for row in content["rows"]] == ["dense", "dense_again"]
    assert content["rows"][0]["n"] == 3
    (engine,) = host.engines
    assert engine.closed
    assert engine.arguments["max_model_len"] == 6
