"""Hook on `EngineArgs.add_cli_args`: our method names parse.

vLLM's parser reads `--speculative-config` as JSON and `--spec-method` from a closed
list. After the original has built them, the first also takes our bare names, the second
lists them; every other value goes to the original.
"""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_accel.config import ELSEWHERE, METHODS, is_ours

used_by_command_line = False
"""Whether this process built vLLM's parser: then errors end it with one line."""


def apply() -> None:
    """Wraps `EngineArgs.add_cli_args` once."""
    original = EngineArgs.add_cli_args
    if hasattr(original, "vllm_accel_original"):
        return
    descriptor = vars(EngineArgs)["add_cli_args"]

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        global used_by_command_line
        used_by_command_line = True
        parser = original(parser)
        _open_names(parser)
        return parser

    add_cli_args.vllm_accel_original = descriptor
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def remove() -> None:
    """Puts the original back."""
    descriptor = getattr(EngineArgs.add_cli_args, "vllm_accel_original", None)
    if descriptor is not None:
        EngineArgs.add_cli_args = descriptor


def _open_names(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if "--speculative-config" in action.option_strings:
            action.type = _or_our_name(action.type)
        elif "--spec-method" in action.option_strings and action.choices:
            action.choices = [*action.choices, *METHODS, *ELSEWHERE]


def _or_our_name(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    @wraps(parse)
    def parse_value(value: str) -> Any:
        return value if is_ours(value) else parse(value)

    return parse_value
