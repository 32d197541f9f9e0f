"""`vllm-accel train`: options of every method's training, and what runs them.

Nothing is imported before a command runs, so that help is quick.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import AccelError, ConfigError
from vllm_accel.options import not_negative, positive, whole

if TYPE_CHECKING:
    from vllm_accel.training.cerberus import TrainingRun
    from vllm_accel.training.free import ExitRun
    from vllm_accel.training.runs import Run

    # Generic to the type checker alone.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_AnyRun = TypeVar("_AnyRun", bound="Run")


def add_parser(commands: "_Commands") -> None:
    """Adds `train METHOD`."""
    train = commands.add_parser("train", help="train what a method drafts with")
    methods = train.add_subparsers(dest="method", metavar="METHOD", required=True)
    _add_cerberus(methods)
    _add_free(methods)


def _train_cerberus(options: argparse.Namespace) -> int:
    _check_installed()
    from vllm_accel.training import cerberus

    run = _on_its_data(training_run(options), options.self_generate)
    print(json.dumps(cerberus.train(run), indent=2))
    return 0


def _train_free(options: argparse.Namespace) -> int:
    _check_installed()
    from vllm_accel.training import free

    run = _on_its_data(exit_run(options), options.self_generate)
    print(json.dumps(free.train(run), indent=2))
    return 0


def _check_installed() -> None:
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise AccelError(
                f"Training needs {name}, which is not installed: expected the train "
                "extra; run pip install 'vllm-accel[train]'."
            )
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def training_run(options: argparse.Namespace) -> "TrainingRun":
    """What the options of `train cerberus` ask for; needs the train extra."""
    from vllm_accel.training.cerberus import TrainingRun

    return _asked(TrainingRun, options)


def exit_run(options: argparse.Namespace) -> "ExitRun":
    """What the options of `train free` ask for; needs the train extra."""
    from vllm_accel.training.free import ExitRun

    return _asked(ExitRun, options)


def _asked(run: type[_AnyRun], options: argparse.Namespace) -> _AnyRun:
    names = [field.name for field in dataclasses.fields(run)]
    settings = {name: getattr(options, name) for name in names}
    return run(**settings | {"data": tuple(options.data)})


def _on_its_data(run: _AnyRun, rows: int | None) -> _AnyRun:
    """The run; on the model's own continuations of its data if rows of them are asked."""
    if not rows:
        return run
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--self-generate was started by accelerate in several processes: expected one; "
            "generate without accelerate first, then train on continuations.jsonl."
        )
    from vllm_accel.training import runs

    texts = runs.whole_texts(run)
    file = run.output / "generation" / "continuations.jsonl"
    try:
        from vllm_accel.host import generate
    except ImportError as error:
        raise AccelError(
            f"--self-generate needs vLLM, which cannot be imported ({error}): expected an "
            "installed vLLM 0.32; install it, or leave the option out."
        ) from error
    generate.continue_rows(run.model, texts, file, rows)
    return dataclasses.replace(run, data=(file,))


def _add_cerberus(methods: "_Commands") -> None:
    parser = methods.add_parser(
        "cerberus",
        help="parallel heads with cross-links (arXiv 2410.13344)",
        description="Trains heads on a frozen model and writes a folder that "
        "`--speculative-config` takes. Run it again to resume.",
    )
    add = parser.add_argument
    _add_files(parser, output="folder to write the heads to")
    add(
        "--heads",
        choices=("cerberus", "medusa"),
        default="cerberus",
        help="linked blocks, or Medusa's one block per head, written in vLLM's own "
        "`medusa` format too; default cerberus",
    )
    add(
        "--targets",
        choices=("data", "base"),
        default="data",
        help="learn the text's tokens, or the model's own choices wherever the text "
        "follows them; default data",
    )
    add(
        "--own-lm-heads",
        action="store_true",
        help="train an LM head per head instead of using the model's",
    )
    _add_numbers(parser, _CERBERUS_NUMBERS + _NUMBERS)
    add(
        "--no-cross-links",
        dest="cross_links",
        action="store_false",
        help="heads that do not read each other, as Medusa's; default: they do",
    )
    add(
        "--no-token",
        dest="reads_token",
        action="store_false",
        help="heads that do not read the token just chosen, as in the paper; default: they "
        "do",
    )
    parser.set_defaults(run=_train_cerberus)


def _add_free(methods: "_Commands") -> None:
    parser = methods.add_parser(
        "free",
        help="an exit after the first layers (arXiv 2310.05424)",
        description="Trains a model to exit after its first layers, or with --freeze-base "
        "an adapter for a model that stays as it is, and measures how far the exit can be "
        "trusted. Run it again to resume.",
    )
    add = parser.add_argument
    _add_files(
        parser,
        output="folder to write to: the exit with --freeze-base, otherwise the whole model "
        "in bfloat16 with the exit in its folder `free`",
    )
    add(
        "--exit-layer",
        required=True,
        type=whole(1),
        metavar="L",
        help="layers before the exit; a quarter to a third of the model's is a good start",
    )
    add(
        "--kd",
        choices=("last", "unif", "dyna"),
        default="dyna",
        help="deep layers teach the last shallow one, every shallow one at even distances, "
        "or whichever is most alike; default dyna",
    )
    add(
        "--freeze-base",
        action="store_true",
        help="train the adapter alone; without it every weight of the model learns",
    )
    add(
        "--adapter",
        choices=("auto", "none", "mlp", "low_rank"),
        default="auto",
        help="between exit and final norm: a residual MLP, a linear one, or nothing; "
        "default mlp with --freeze-base, otherwise none, as in the paper",
    )
    add(
        "--targets",
        choices=("data", "base"),
        default="data",
        help="the exit learns the text's tokens, as in the paper, or the deep layers' own "
        "choices (best with --freeze-base); default data",
    )
    _add_numbers(parser, _FREE_NUMBERS + [n for n in _NUMBERS if n[0] != "--learning-rate"])
    add(
        "--learning-rate",
        type=positive,
        default=0.0,
        metavar="N",
        help="AdamW's, at its peak; default 1e-4, with --freeze-base 1e-3",
    )
    parser.set_defaults(run=_train_free)


def _add_files(parser: argparse.ArgumentParser, *, output: str) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the model to draft for: a folder or a hub id")
    add(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help='text; .jsonl of {"text"} or of continuations, see --self-generate',
    )
    add("--output", required=True, type=Path, help=output)
    add(
        "--self-generate",
        nargs="?",
        type=whole(2),
        const=4096,
        metavar="ROWS",
        help="first continue windows of the data with the model itself, through vLLM, and "
        "train on that (best); ROWS: default 4096",
    )
    add("--license", default="other", help="of what is trained, for the model card")


_Number = tuple[str, Callable[[str], float], float, str]


def _add_numbers(parser: argparse.ArgumentParser, numbers: list[_Number]) -> None:
    for name, kind, default, text in numbers:
        parser.add_argument(
            name,
            type=kind,
            default=default,
            metavar="N",
            help=f"{text}; default {default:g}",
        )


_NUMBERS: list[_Number] = [
    ("--epochs", positive, 1.0, "passes over the data"),
    ("--learning-rate", positive, 1e-3, "AdamW's, at its peak"),
    ("--batch-size", whole(1), 8, "rows per step and device"),
    ("--row-tokens", whole(2), 512, "most tokens of a row"),
    ("--held-out-rows", whole(1), 64, "rows kept to measure on, a tenth at most"),
    ("--save-steps", whole(1), 200, "steps between checkpoints"),
    ("--seed", whole(0), 0, "of shuffling and training"),
]
"""Option, type, default and help; the defaults are the runs' own, a test says so."""

_CERBERUS_NUMBERS: list[_Number] = [
    ("--draft-tokens", whole(1, MAX_DRAFT_TOKENS), 4, "heads, one per drafted token"),
    ("--blocks", whole(1, 8), 2, "residual blocks per head"),
    ("--draft-vocab", whole(0), 0, "draft the N most frequent tokens only; 0: all"),
    ("--draft-cost", positive, 0.35, "extra time of a drafting step, in plain steps"),
]

_FREE_NUMBERS: list[_Number] = [
    (
        "--kd-weight",
        not_negative,
        0.5,
        "alpha, what distillation counts beside cross-entropy",
    ),
    ("--adapter-width", whole(1, 2**16), 256, "numbers in the adapter's middle"),
]
