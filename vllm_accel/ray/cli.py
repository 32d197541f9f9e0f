"""`vllm-accel ray serve|batch`: options, and what they start.

Nothing heavy is imported before a command runs, so that help is quick.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_accel.errors import ConfigError
from vllm_accel.options import json_object, whole
from vllm_accel.ray import extra
from vllm_accel.ray.settings import ACCELERATORS, ReplicaSettings

if TYPE_CHECKING:
    from vllm_accel.ray.cluster import Where

    # Generic to the type checker alone.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


_INTERRUPTED = 130
"""Exit code of a command that a person stopped."""


def add_parser(commands: "_Commands") -> None:
    """Adds `ray` to the commands of `vllm-accel`."""
    ray = commands.add_parser("ray", help="several engines on one or more machines")
    kinds = ray.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_serve(kinds)
    _add_batch(kinds)


def _add_serve(kinds: "_Commands") -> None:
    parser = kinds.add_parser(
        "serve",
        help="replicas behind one OpenAI endpoint, on Ray Serve LLM",
        description="Serves until it is stopped. A killed replica, engine or worker "
        "loses no answer that had not begun; a stream that had ends with an error.",
    )
    _add_engines(parser)
    add = parser.add_argument
    add("--name", help="what clients call the model; default: what --model says")
    add("--host", default="127.0.0.1", help="default %(default)s")
    add("--port", type=whole(1, 65535), default=8000, help="default %(default)s")
    add(
        "--metrics-port",
        type=whole(1, 65535),
        help="of this node's Ray metrics, when this command starts Ray; default: any",
    )
    add(
        "--share-gate",
        action="store_true",
        help="new replicas start from what the gates of the others learnt",
    )
    parser.set_defaults(run=_serve)


def _add_batch(kinds: "_Commands") -> None:
    parser = kinds.add_parser(
        "batch",
        help="many prompts through several engines, on Ray Data",
        description="Answers every line of a JSONL file. Stopped, it goes on where it was "
        "when the same command is given again. Exits with 1 when a row could not be "
        "answered.",
    )
    _add_engines(parser)
    add = parser.add_argument
    add(
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help='JSONL of {"prompt"} or {"messages"}, and maybe "sampling_params"',
    )
    add("--output", required=True, type=Path, metavar="FILE", help="parquet, a new file")
    add("--max-tokens", type=whole(1), default=256, metavar="N", help="default 256")
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="default 0: the likeliest token",
    )
    add(
        "--batch-size",
        type=whole(1),
        default=16,
        metavar="N",
        help="rows an engine takes at once; default 16",
    )
    parser.set_defaults(run=_batch)


def _add_engines(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a folder, the same on every node, or a hub id")
    add("--replicas", type=whole(1), default=1, metavar="N", help="default 1")
    add(
        "--speculative-config",
        type=_name_or_json,
        metavar="NAME|JSON",
        help="as of `vllm serve`",
    )
    add("--lazyllm", type=json_object, metavar="JSON", help="settings of LazyLLM")
    add(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="other arguments of vLLM by their names in Python, such as "
        "'{\"max_model_len\": 4096}'",
    )
    add("--accelerator", choices=ACCELERATORS, help="default: what vLLM was built for")
    add(
        "--threads",
        type=whole(1),
        metavar="N",
        help="cores of each worker on CPU; default: those there are, divided",
    )
    add(
        "--env",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment of the engines, on every node; VLLM_* of this shell go along",
    )
    add(
        "--address",
        help="of a running Ray cluster, `auto` for this machine's; default: RAY_ADDRESS, "
        "else a Ray of this command's own",
    )


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options, name=options.name, share_gate=options.share_gate)
    extra.require()
    from vllm_accel.ray.serving import Endpoint, serve_until_stopped

    endpoint = Endpoint(host=options.host, port=options.port)
    where = _where(options, metrics_port=options.metrics_port)
    try:
        serve_until_stopped(settings, where, endpoint)
    except KeyboardInterrupt:  # before the replicas were up
        return _INTERRUPTED
    return 0


def _batch(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if not options.input.is_file():
        raise ConfigError(f"--input {options.input} is no file: expected JSONL; check it.")
    extra.require()
    from vllm_accel.ray.batch import BatchPlan, run

    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    plan = BatchPlan(
        settings=settings,
        input=options.input,
        output=options.output,
        sampling=sampling,
        batch_size=options.batch_size,
    )
    try:
        failed = run(plan, _where(options, logs=False))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    print(f"wrote {options.output}" + (f", {failed} rows failed" if failed else ""))
    return 1 if failed else 0


def _settings(options: argparse.Namespace, **more: Any) -> ReplicaSettings:
    return ReplicaSettings(
        model=options.model,
        replicas=options.replicas,
        speculative_config=options.speculative_config,
        lazyllm=options.lazyllm,
        engine_args=options.engine_args,
        accelerator=options.accelerator,
        threads=options.threads,
        env=dict(options.env),
        **more,
    )


def _where(options: argparse.Namespace, **more: Any) -> "Where":
    from vllm_accel.ray.cluster import Where

    return Where(address=options.address, **more)


def _name_or_json(text: str) -> Any:
    return json_object(text) if text.lstrip().startswith("{") else text


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected NAME=VALUE")
    return name, value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected 0..2")
    return value
