"""Types of command-line options; argparse puts what they raise behind the option."""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers, the ends of the range included."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            allowed = f"{least} or more" if most is None else f"{least}..{most}"
            raise argparse.ArgumentTypeError(f"{value} is out of range: expected {allowed}")
        return value

    parse.__name__ = "whole number"  # argparse names it when the text is no number
    return parse


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected more than 0")
    return value


def not_negative(text: str) -> float:
    """A number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected 0 or more")
    return value


def json_object(text: str) -> dict[str, Any]:
    """What a JSON object says."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no JSON object")
    return value
