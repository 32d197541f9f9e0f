"""`vllm-accel ray`: options and refusals; starts nothing."""

import subprocess
import sys

import pytest

from vllm_accel.cli import main, parser
from vllm_accel.ray import cli as ray_commands

SERVE = ["ray", "serve", "--model", "M"]


def batch(tmp_path, *more):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    return ["ray", "batch", "--model", "M", *files, *more]


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )


def test_options_become_settings():
    given = ["--replicas=2", "--speculative-config=cerberus", "--threads=3"]
    more = ["--engine-args", '{"max_model_len": 512}', "--share-gate", "--name=tiny"]
    more += ["--env", "A=1", "--env", "B=x=y"]
    options = parser().parse_args([*SERVE, *given, *more])
    settings = ray_commands._settings(options, name=options.name, share_gate=True)
    assert (settings.model, settings.replicas, settings.threads) == ("M", 2, 3)
    assert settings.speculative_config == "cerberus"
    assert settings.engine_args == {"max_model_len": 512}
    assert settings.served_name == "tiny"
    assert settings.env == {"A": "1", "B": "x=y"}


def test_speculative_config_is_a_name_or_json():
    said = '{"method": "cerberus", "gate": "always"}'
    options = parser().parse_args([*SERVE, "--speculative-config", said])
    assert options.speculative_config == {"method": "cerberus", "gate": "always"}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--replicas", "0", "0 is out of range"),
        ("--threads", "-1", "-1 is out of range"),
        ("--engine-args", "{", "is no JSON"),
        ("--engine-args", "[1]", "is no JSON object"),
        ("--speculative-config", "{method: cerberus}", "is no JSON"),
        ("--accelerator", "tpu", "invalid choice"),
        ("--env", "NAME", "expected NAME=VALUE"),
        ("--port", "none", "invalid"),
    ],
)
def test_options_that_cannot_be_read_are_refused(capsys, option, value, said):
    with pytest.raises(SystemExit) as end:
        main([*SERVE, option, value])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--speculative-config", "cerberos"], "'cerberos' is not one of"),
        (["--engine-args", '{"model": "x"}'], "use 'model'"),
        (["--share-gate"], "no gate that learns"),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_exit_code_two(capsys, more, said):
    assert main([*SERVE, *more]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_missing_input_is_refused_before_anything_starts(tmp_path, capsys):
    arguments = batch(tmp_path)
    (tmp_path / "in.jsonl").unlink()
    assert main(arguments) == 2
    assert "is no file" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["ray", "pyarrow", "pandas"])
@pytest.mark.parametrize("kind", ["serve", "batch"])
def test_without_the_extra_it_says_what_to_install(tmp_path, missing, kind):
    # None in sys.modules is how Python marks a module that cannot be imported.
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "import importlib.util as u; find = u.find_spec\n"
    code += f"u.find_spec = lambda n: find(n) if n == {missing!r} else True\n"
    code += "from vllm_accel.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = SERVE if kind == "serve" else batch(tmp_path)
    done = python(code, *arguments)
    assert done.returncode == 2, done.stderr
    assert f"need {missing}, which is not installed" in done.stderr
    assert "pip install '.[ray]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_and_the_package_import_no_ray():
    code = "import sys\nimport vllm_accel.ray\nfrom vllm_accel.cli import main\n"
    code += "try: main(['ray', 'serve', '--help'])\n"
    code += "except SystemExit: print(sys.modules.keys() & {'ray', 'torch', 'vllm'})"
    assert python(code).stdout.splitlines()[-1] == "set()"


def test_help_names_both_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["ray", "--help"])
    said = capsys.readouterr().out
    assert "serve " in said
    assert "batch " in said
