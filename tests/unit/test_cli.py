"""The command line: help, options, errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_accel import __version__
from vllm_accel.cli import main, parser
from vllm_accel.train import training_run


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vllm_accel.cli", *arguments],
        capture_output=True,
        text=True,
    )


def test_help_names_every_command():
    done = command("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: vllm-accel ")
    for name in ("doctor", "serve", "train", "bench"):
        assert f"\n    {name} " in done.stdout


def test_help_imports_neither_torch_nor_vllm():
    code = "import sys\nfrom vllm_accel.cli import main\n"
    code += "try: main(['train', 'cerberus', '--help'])\n"
    code += "except SystemExit: print(sys.modules.keys() & {'torch', 'vllm'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vllm-accel {__version__}\n"


def test_an_error_is_one_line_and_exit_code_two():
    done = command("doctor", "--heads", "HEADS")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vllm-accel: error: --heads HEADS is given without")
    assert done.stderr.count("\n") == 1


def test_training_defaults_are_those_of_a_run():
    cerberus = pytest.importorskip("vllm_accel.training.cerberus")
    arguments = ["--model", "M", "--data", "a.txt", "b.jsonl", "--output", "out"]
    options = parser().parse_args(["train", "cerberus", *arguments])
    data = (Path("a.txt"), Path("b.jsonl"))
    run = cerberus.TrainingRun(model="M", data=data, output=Path("out"))
    assert training_run(options) == run


def test_every_training_option_reaches_the_run():
    given = {
        "--draft-tokens": 3,
        "--blocks": 1,
        "--epochs": 0.5,
        "--learning-rate": 0.01,
        "--batch-size": 2,
        "--row-tokens": 64,
        "--held-out-rows": 5,
        "--draft-cost": 0.2,
        "--save-steps": 7,
        "--seed": 9,
    }
    arguments = [text for pair in given.items() for text in map(str, pair)]
    arguments += ["--model", "M", "--data", "a", "--output", "o", "--no-cross-links"]
    options = vars(parser().parse_args(["train", "cerberus", *arguments]))
    for name, value in given.items():
        assert options[name[2:].replace("-", "_")] == value
    assert options["cross_links"] is False


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--draft-tokens", "17"),
        ("--blocks", "0"),
        ("--blocks", "9"),
        ("--epochs", "0"),
        ("--learning-rate", "nan"),
        ("--row-tokens", "1"),
        ("--batch-size", "two"),
    ],
)
def test_training_refuses_values_heads_could_not_be_saved_or_served_with(
    capsys, option, value
):
    arguments = ["--model", "M", "--data", "a", "--output", "o", option, value]
    with pytest.raises(SystemExit) as end:
        main(["train", "cerberus", *arguments])
    assert end.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_training_without_its_extra_says_which_to_install(missing):
    # None in sys.modules is how Python marks a module that cannot be imported.
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "from vllm_accel.cli import main; sys.exit(main())"
    arguments = ["train", "cerberus", "--model", "M", "--data", "a", "--output", "o"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"Training needs {missing}" in done.stderr
    assert "pip install 'vllm-accel[train]'" in done.stderr
