"""The methods a bench knows, as arguments of vLLM's engine."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_accel.errors import ConfigError
from vllm_accel.lazyllm.config import LazyConfig

COUNTED = {"cerberus", "free", "free-exit", "free-always"}
"""Methods of ours: they count what their gate does."""

INEXACT = {"free-exit", "free-always"}
"""Methods whose answers may be others than plain vLLM's."""

_OF_GATES = ("gate", "threshold", "max_updates", "min_observations", "decay")
_OF_EXIT = ("exit_quality", "rollback")

MEDUSA_FOLDERS = ("vllm_medusa", "medusa")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a method may need to know.

    Attributes:
        model: folder or hub id.
        medusa: folder of the heads; None looks in the model's folder and beside it.
        cerberus: keys of its `--speculative-config`.
        free: the same.
        lazyllm: its settings.
    """

    model: str
    medusa: Path | None = None
    cerberus: dict[str, Any] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    lazyllm: dict[str, Any] = field(default_factory=dict)


def named(names: Sequence[str], known: Sequence[str], baseline: str) -> list[str]:
    """The methods to run: the baseline first, each of them once.

    Raises:
        ConfigError: a name is not known.
    """
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--methods has {name!r}: expected names among {', '.join(known)}; "
                "correct it."
            )
    return list(dict.fromkeys([baseline, *names]))


def decode_arguments(names: Sequence[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Arguments of the engine for each method of `bench decode`, plain first.

    Raises:
        ConfigError: a method is unknown, or lacks its heads or its library.
    """
    return {name: DECODE[name](settings) for name in named(names, list(DECODE), "plain")}


def prefill_arguments(
    names: Sequence[str], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Arguments of the engine for each method of `bench prefill`, dense first.

    Raises:
        ConfigError: a method is unknown.
    """
    known = named(names, list(PREFILL), "dense")
    return {name: PREFILL[name](settings) for name in known}


def _cerberus(settings: Settings) -> dict[str, Any]:
    return {"speculative_config": {"method": "cerberus", **settings.cerberus}}


def _free(settings: Settings) -> dict[str, Any]:
    return _free_without(settings, *_OF_EXIT)


def _free_exit(settings: Settings) -> dict[str, Any]:
    return _free_without(settings, *_OF_GATES, mode="exit")


def _free_always(settings: Settings) -> dict[str, Any]:
    """Every draft is made and is final: the most that mode `exit` can give."""
    return _free_without(settings, *_OF_GATES, *_OF_EXIT, mode="exit", gate="always")


def _free_without(settings: Settings, *keys: str, **more: Any) -> dict[str, Any]:
    """What was asked for, less what another mode or gate would refuse."""
    own = {key: value for key, value in settings.free.items() if key not in keys}
    return {"speculative_config": {"method": "free", **own, **more}}


def _medusa(settings: Settings) -> dict[str, Any]:
    folder = _medusa_folder(settings)
    config = {
        "method": "medusa",
        "model": str(folder),
        "num_speculative_tokens": _num_heads(folder),
    }
    return {"speculative_config": config}


def _medusa_folder(settings: Settings) -> Path:
    """Of heads in vLLM's format, which training writes into a folder of the heads."""
    model = Path(settings.model)
    near = [place / name for place in (model, model.parent) for name in MEDUSA_FOLDERS]
    given = [settings.medusa] if settings.medusa else near
    folders = [folder / inner for folder in given for inner in (MEDUSA_FOLDERS[0], "")]
    found = next((folder for folder in folders if _num_heads(folder)), None)
    if found is None:
        raise ConfigError(
            f"No Medusa heads in {' or '.join(map(str, given))}: expected a folder in "
            "vLLM's own format, with num_heads in its config.json; name it with --medusa, "
            "or leave medusa out of --methods."
        )
    return found


def _num_heads(folder: Path) -> int:
    """0 where there are no heads in vLLM's format."""
    try:
        heads = json.loads((folder / "config.json").read_text())["num_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return heads if isinstance(heads, int) else 0


def _ngram(settings: Settings) -> dict[str, Any]:
    config = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    return {"speculative_config": config}


def _suffix(settings: Settings) -> dict[str, Any]:
    if importlib.util.find_spec("arctic_inference") is None:
        raise ConfigError(
            "--methods has suffix, whose library arctic_inference is not installed: "
            "expected it beside vLLM; run pip install arctic-inference==0.1.1, or leave "
            "suffix out."
        )
    # Prompts come again when the file is short: answers kept from earlier rounds would
    # be drafted word for word.
    config = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
    return {"speculative_config": config}


DECODE: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "plain": lambda settings: {},
    "cerberus": _cerberus,
    "free": _free,
    "free-exit": _free_exit,
    "free-always": _free_always,
    "medusa": _medusa,
    "ngram": _ngram,
    "suffix": _suffix,
}
"""Arguments of the engine for each method of `bench decode`."""

LAZY_PAGE = 64
"""Tokens in a KV page where lazyllm keeps or leaves out pages."""

WHOLE_PROMPT = 8192
"""Tokens of a step of `dense-whole`, as lazyllm has them (`max_whole_prompt`)."""


def _lazyllm(settings: Settings, **baseline: Any) -> dict[str, Any]:
    lazy = settings.lazyllm | baseline
    by_pages = LazyConfig.from_mapping(lazy).granularity == "page"
    smaller = {"block_size": LAZY_PAGE} if by_pages else {}
    return {"additional_config": {"lazyllm": lazy}, **smaller}


def _by_tokens(settings: Settings) -> dict[str, Any]:
    """Tokens kept one by one, as in the paper; none comes back."""
    return _lazyllm(settings, granularity="token", revive="off")


def _with_cerberus(settings: Settings) -> dict[str, Any]:
    """Prunes the prompt and drafts the answer."""
    return _lazyllm(settings) | _cerberus(settings)


def _random_drop(settings: Settings) -> dict[str, Any]:
    """As much of a prompt as lazyllm keeps, where it keeps it, chosen by chance."""
    return _lazyllm(settings, choose="random", revive="off")


def _static_prune(settings: Settings) -> dict[str, Any]:
    """Down to what lazyllm keeps in the end, once, at its first point."""
    kept = LazyConfig.from_mapping(settings.lazyllm).kept
    last = kept[-1] if isinstance(kept, tuple) else kept
    return _lazyllm(settings, keep=last, progressive=False, revive="off")


PREFILL: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "dense": lambda settings: {},
    "dense-whole": lambda settings: {"max_num_batched_tokens": WHOLE_PROMPT},
    "lazyllm": _lazyllm,
    "lazyllm-page": lambda settings: _lazyllm(settings, granularity="page"),
    "lazyllm-token": _by_tokens,
    "lazyllm-cerberus": _with_cerberus,
    "random-drop": _random_drop,
    "static-prune": _static_prune,
}
"""Arguments of the engine for each method of `bench prefill`: the paper's (table 1)."""
