"""`vllm-accel train free` on a tiny model: it learns, resumes, leaves the rest alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vllm_accel import ConfigError
from vllm_accel.cli import main, parser
from vllm_accel.free import checkpoint
from vllm_accel.on_disk import base_model
from vllm_accel.testing import write_tiny_model
from vllm_accel.train import exit_run
from vllm_accel.training import data, free, runs
from vllm_accel.training.free import ExitRun
from vllm_accel.training.precision import fast_dtype

VOCAB = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of four layers with a tokenizer."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("free") / "tiny4"
    write_tiny_model(folder, layers=4, scale=0.1)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Texts that count up in steps: simple enough to be learnt in seconds."""
    file = tmp_path_factory.mktemp("rows") / "count.jsonl"
    lines = [
        {"prompt_ids": [i], "token_ids": [(i + n * (1 + i % 3)) % VOCAB for n in range(12)]}
        for i in range(VOCAB)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def asked(model, rows, output, **changes):
    settings = {
        "exit_layer": 2,
        "kd": "dyna",
        "epochs": 4.0,
        "batch_size": 8,
        "row_tokens": 16,
        "held_out_rows": 6,
        "save_steps": 8,
        "learning_rate": 3e-3,
        "adapter_width": 16,
    }
    return ExitRun(model=str(model), data=(rows,), output=output, **(settings | changes))


@torch.no_grad()
def loss(run, folder, adapter=None):
    """The run's loss on its rows, of a model and adapter as they lie on disk."""
    other = dataclasses.replace(run, model=str(folder), output=run.output / "other")
    begun = runs.prepare(other, torch.float32)
    shutil.rmtree(other.output)
    model = free._new_model(run, begun.base)
    if adapter is not None:
        model.adapter.load_state_dict(adapter.float().state_dict())
    return float(model(**data.collate(begun.training))["loss"])


@pytest.mark.parametrize("kd", ["last", "unif", "dyna"])
def test_a_whole_model_learns_to_exit_and_is_saved_as_a_model(tmp_path, model, rows, kd):
    run = asked(model, rows, tmp_path / "out", kd=kd)
    figures = free.train(run)
    assert loss(run, run.output) < 0.8 * loss(run, model)
    assert figures["deep_loss"] < figures["deep_loss_before"]
    config, _ = checkpoint.load(run.output / "free")
    assert (config.exit_layer, config.num_layers, config.adapter) == (2, 4, "none")
    assert config.base_name == "out"
    agreement = checkpoint.check_against_base(run.output / "free", run.output)
    assert agreement == pytest.approx(config.agreement, abs=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(run.output, dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert json.loads((run.output / "metrics.json").read_text()) == figures


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, model, rows):
    """An adapter trained on a frozen base, and its figures."""
    output = tmp_path_factory.mktemp("adapter") / "exit"
    run = asked(
        model, rows, output, freeze_base=True, targets="base", license="mit", kd="last"
    )
    return run, free.train(run)


def test_an_adapter_learns_alone(adapter_run, model):
    run, figures = adapter_run
    config, adapter = checkpoint.load(run.output)
    assert (config.adapter, config.adapter_width) == ("mlp", 16)
    assert loss(run, model, adapter) < loss(run, model)
    assert checkpoint.check_against_base(run.output, model) == pytest.approx(
        config.agreement, abs=1e-4
    )
    assert not {"deep_loss", "deep_loss_before"} & figures.keys()
    assert not (run.output / "free").exists()


def test_the_figures_are_written_and_told(adapter_run):
    run, figures = adapter_run
    assert json.loads((run.output / "metrics.json").read_text()) == figures
    assert figures["held_out_tokens"] == 6 * 12
    assert 0 <= figures["agreement"] <= 1
    assert figures["mean_agreed_run"] >= 0
    assert len(figures["thresholds"]) == 12
    card = (run.output / "README.md").read_text()
    assert "license: mit" in card
    assert "`count.jsonl`" in card
    assert f"**{figures['agreement']:.1%}**" in card
    assert '"method": "free"' in card
    assert "{" not in card.replace('{"method": "free", "model": "exit"}', "")


def test_a_frozen_base_stays_as_it_is_to_the_bit(tmp_path, model, rows):
    run = asked(model, rows, tmp_path / "out", freeze_base=True, epochs=1.0)
    begun = runs.prepare(run, fast_dtype())
    training = free._new_model(run, begun.base)
    before = {name: w.clone() for name, w in begun.base.state_dict().items()}
    adapter = {name: w.clone() for name, w in training.adapter.state_dict().items()}
    fingerprint = base_model.fingerprint(model)
    assert runs.fit(run, begun, training)
    after = begun.base.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    learnt = training.adapter.state_dict()
    assert not any(torch.equal(learnt[name], w) for name, w in adapter.items())
    assert base_model.fingerprint(model) == fingerprint


@pytest.mark.parametrize("freeze_base", [True, False])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, model, rows, freeze_base):
    settings = {"freeze_base": freeze_base, "epochs": 2.0, "save_steps": 6}
    whole = asked(model, rows, tmp_path / "whole", **settings)
    free.train(whole)
    half = tmp_path / "half"
    work = whole.output / "checkpoints"
    steps = sorted(work.glob("checkpoint-*"), key=lambda f: int(f.name[11:]))
    assert [step.name for step in steps] == ["checkpoint-12", "checkpoint-16"]
    shutil.copytree(steps[0], half / "checkpoints" / steps[0].name)
    free.train(asked(model, rows, half, **settings))
    for file in whole.output.rglob("*.safetensors"):
        if "checkpoints" not in file.parts:
            other = half / file.relative_to(whole.output)
            assert file.read_bytes() == other.read_bytes(), file


@pytest.mark.parametrize("exit_layer", [0, 4, 40])
def test_an_exit_outside_the_model_is_refused(tmp_path, model, rows, exit_layer):
    run = asked(model, rows, tmp_path / "out", exit_layer=exit_layer)
    with pytest.raises(ConfigError, match=rf"exit_layer={exit_layer} .* expected 1\.\.3 "):
        free.train(run)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kd": "first"}, "kd='first' is not known: expected last or unif or dyna"),
        ({"adapter": "big"}, "adapter='big' is not known"),
        ({"targets": "none"}, "targets='none' is not known"),
        (
            {"adapter": "mlp", "adapter_width": 0},
            r"adapter_width=0 is out of range: expected 1\.\.65536",
        ),
        ({"kd_weight": -1.0}, "kd_weight=-1.0 is out of range"),
        ({"kd_weight": float("nan")}, "kd_weight=nan is out of range"),
        ({"freeze_base": True, "adapter": "none"}, "leaves nothing to train"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        asked("m", Path("a"), tmp_path, **changes)


def test_another_run_in_the_same_folder_is_refused(tmp_path, model, rows):
    run = asked(model, rows, tmp_path / "out")
    runs.work_folder(run, "checkpoints")
    with pytest.raises(ConfigError, match="belongs to a run with kd=dyna, not last"):
        free.train(dataclasses.replace(run, kd="last"))


ARGUMENTS = ["train", "free", "--model", "M", "--data", "a", "--output", "o"]


@pytest.mark.parametrize("more", [[], ["--freeze-base"]])
def test_training_defaults_are_those_of_a_run(more):
    options = parser().parse_args([*ARGUMENTS, "--exit-layer", "3", *more])
    settings = {"freeze_base": bool(more)}
    run = ExitRun(model="M", data=(Path("a"),), output=Path("o"), exit_layer=3, **settings)
    assert exit_run(options) == run
    assert run.adapter == ("mlp" if more else "none")
    assert run.learning_rate == (1e-3 if more else 1e-4)


def test_every_option_reaches_the_run():
    given = {
        "--exit-layer": 3,
        "--kd": "unif",
        "--kd-weight": 0.25,
        "--adapter": "low_rank",
        "--adapter-width": 32,
        "--targets": "base",
        "--epochs": 0.5,
        "--learning-rate": 0.01,
        "--batch-size": 2,
        "--row-tokens": 64,
        "--held-out-rows": 5,
        "--save-steps": 7,
        "--seed": 9,
        "--license": "mit",
    }
    texts = [text for pair in given.items() for text in map(str, pair)]
    run = exit_run(parser().parse_args([*ARGUMENTS, *texts, "--freeze-base"]))
    for name, value in given.items():
        assert getattr(run, name[2:].replace("-", "_")) == value
    assert run.freeze_base


@pytest.mark.parametrize(
    "more",
    [
        ["--exit-layer", "0"],
        ["--exit-layer", "2", "--kd", "all"],
        [],
        ["--kd-weight", "-1"],
    ],
)
def test_the_command_refuses_what_cannot_be(capsys, more):
    with pytest.raises(SystemExit) as end:
        main([*ARGUMENTS, *more])
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_prints_the_figures(tmp_path, model, rows, capsys):
    output = tmp_path / "exit"
    arguments = ["--model", model, "--data", rows, "--output", output, "--exit-layer", 2]
    arguments += ["--freeze-base", "--row-tokens", 16, "--held-out-rows", 4]
    assert main(["train", "free", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed[printed.index("{\n") :])
    assert figures == json.loads((output / "metrics.json").read_text())
