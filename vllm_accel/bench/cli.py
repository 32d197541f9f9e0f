"""`vllm-accel bench decode|prefill|report`: options, and what they start.

Nothing heavy is imported before a command runs, so that help is quick.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_accel.errors import AccelError, ConfigError
from vllm_accel.options import json_object, not_negative, whole

if TYPE_CHECKING:
    from vllm_accel.bench.decode import DecodePlan
    from vllm_accel.bench.engine import Engine, Tokenizer
    from vllm_accel.bench.prompts import Prompt
    from vllm_accel.bench.results import Document
    from vllm_accel.bench.tasks import Question

    # Generic to the type checker alone.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_KV_CACHE_BYTES = 2**28
_LEAST_SEQS = 8


def add_parser(commands: "_Commands") -> None:
    """Adds `bench` to the commands of `vllm-accel`."""
    bench = commands.add_parser("bench", help="methods side by side, and a page of it")
    kinds = bench.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_decode(kinds)
    _add_prefill(kinds)
    _add_report(kinds)


def _decode(options: argparse.Namespace) -> int:
    _need("tqdm")
    from tqdm import tqdm

    from vllm_accel.bench import methods, table
    from vllm_accel.bench.decode import DecodeBench

    _check_prompt_sets(options.prompt_sets)
    settings = methods.Settings(
        options.model, options.medusa, options.cerberus, options.free
    )
    by_method = methods.decode_arguments(options.methods, settings)
    _check_readable(options.prompts)
    _with_preloads()
    plan = _plan(options)
    chosen = _prompts(options, plan)
    common = _common(options, max(_LEAST_SEQS, *plan.batch_sizes), options.max_model_len)
    total = plan.answers(len(chosen), len(by_method) + 1)
    with _running(by_method, common) as engines, tqdm(total=total, unit="answers") as bar:
        bench = DecodeBench(engines, plan, bar.update)
        content = _written(options.output, bench.rows(chosen))
    print(table.as_text(content))
    for method, batch_size, difference in bench.differences:
        print(f"DIFFERENCE {method}, batch size {batch_size}, {difference}")
    return 1 if bench.differences else 0


def _prefill(options: argparse.Namespace) -> int:
    _need("tqdm")
    from tqdm import tqdm

    from vllm_accel.bench import methods, prefill, table

    settings = methods.Settings(options.model, lazyllm=options.lazyllm)
    by_method = methods.prefill_arguments(options.methods, settings)
    _check_readable(options.tasks)
    _with_preloads()
    tokenizer = _host().tokenizer(options.model)
    groups = _questions(options, tokenizer)
    for questions in groups:
        prefill.check_rounds(len(questions), options.rounds)
    longest = prefill.longest(groups, options.max_tokens)
    common = _common(options, _LEAST_SEQS, options.max_model_len or longest)
    common["disable_log_stats"] = False  # pages are counted there
    total = prefill.answers(groups, len(by_method) + 1)
    with _running(by_method, common) as engines, tqdm(total=total, unit="answers") as bar:
        bench = prefill.PrefillBench(
            engines, tokenizer, options.rounds, bar.update, options.max_tokens
        )
        content = _written(options.output, bench.rows(groups))
    print(table.as_text(content))
    return 0


def _report(options: argparse.Namespace) -> int:
    for name in ("matplotlib", "jinja2"):
        _need(name)
    from vllm_accel.bench import report, results

    documents = [(file.stem, results.load(file)) for file in options.files]
    report.write_html(options.html, documents)
    print(f"wrote {options.html}")
    if options.png:
        report.write_png(options.png, documents)
        print(f"wrote {options.png}")
    return 0


def _need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise AccelError(
            f"vllm-accel bench needs {name}, which is not installed: expected the bench "
            "extra; run pip install 'vllm-accel[bench]'."
        )


def _host() -> Any:
    """The module that imports vLLM, which says a line per reset and much more."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm_accel.host import engines
    except ImportError as error:
        raise AccelError(
            f"vllm-accel bench needs vLLM, which cannot be imported ({error}): expected an "
            "installed vLLM 0.32; run `vllm-accel doctor`."
        ) from error
    return engines


def _check_prompt_sets(names: list[str]) -> None:
    from vllm_accel.bench.decode import PROMPT_SETS

    for name in names:
        if name not in PROMPT_SETS:
            raise ConfigError(
                f"--prompt-sets has {name!r}: expected names among "
                f"{', '.join(PROMPT_SETS)}; correct it."
            )


def _check_readable(file: Path | None) -> None:
    """Before minutes of starting engines."""
    from vllm_accel.bench import prompts

    if file is not None:
        prompts.lines(file)


def _with_preloads() -> None:
    """Starts this command again with LD_PRELOAD as `vllm-accel serve` has it."""
    from vllm_accel.serve import with_preloads

    wanted = with_preloads(os.environ)
    if wanted.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def _plan(options: argparse.Namespace) -> "DecodePlan":
    from vllm_accel.bench.decode import DecodePlan

    return DecodePlan(
        batch_sizes=tuple(options.batch_sizes),
        prompt_sets=tuple(options.prompt_sets),
        rounds=options.rounds,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        num_prompts=options.num_prompts,
    )


def _prompts(options: argparse.Namespace, plan: "DecodePlan") -> "list[Prompt]":
    from vllm_accel.bench import prompts

    tokenizer = _host().tokenizer(options.model)
    if options.synthetic:
        chosen = prompts.synthetic(tokenizer, plan.most_prompts())
    else:
        chosen = prompts.read(options.prompts, tokenizer.encode)
    prompts.check_lengths(chosen, plan.max_tokens, options.max_model_len)
    return chosen


def _questions(
    options: argparse.Namespace, tokenizer: "Tokenizer"
) -> "list[list[Question]]":
    """A group for each length, or one of the user's own."""
    from vllm_accel.bench import tasks

    if options.tasks is not None:
        return [tasks.read(options.tasks, tokenizer)]
    lengths = options.prompt_lengths
    return [tasks.made(tokenizer, length, options.questions) for length in lengths]


def _common(
    options: argparse.Namespace, max_num_seqs: int, max_model_len: int
) -> dict[str, Any]:
    """Arguments every engine gets."""
    return {
        "model": options.model,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "dtype": options.dtype,
    }


@contextmanager
def _running(
    by_method: Mapping[str, dict[str, Any]], common: dict[str, Any]
) -> "Iterator[dict[str, Engine]]":
    """Every engine up at once, each with processes of its own."""
    boot = _host().Engine
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(closing(boot(**common, **arguments)))
            for name, arguments in by_method.items()
        }


def _written(output: Path, groups: "Iterator[list[dict[str, Any]]]") -> "Document":
    """All rows; written after every group, so that a stop loses little."""
    from vllm_accel.bench import results

    device = _host().device_name()
    content = results.document(results.command_line(), device)
    for rows in groups:
        content["rows"] += rows
        results.write(output, content)
    return content


def _add_decode(kinds: "_Commands") -> None:
    parser = kinds.add_parser(
        "decode",
        help="tokens per second over plain vLLM, by batch size",
        description="All methods take turns in one run, plain vLLM twice in each round "
        "(`plain_again`: what noise does to a ratio). Prefill is not counted. Exits with "
        "1 when a greedy answer differs from plain vLLM's and is no tie.",
    )
    add = parser.add_argument
    _add_common(parser, methods="plain,cerberus,ngram")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL of `prompt`, or of Spec-Bench's `turns`, whose first is used",
    )
    source.add_argument(
        "--synthetic", action="store_true", help="random token ids, always the same"
    )
    add("--medusa", type=Path, help="folder of the heads; default: in or beside the model")
    for method, example in (("cerberus", '"gate": "always"'), ("free", '"exit_layer": 3')):
        add(
            f"--{method}",
            type=json_object,
            default={},
            metavar="JSON",
            help=f"more settings for {method}, such as {{{example}}}",
        )
    add(
        "--batch-sizes",
        type=_wholes,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N,...",
        help="requests asked at once; default 1,2,4,8,16,32,64",
    )
    add("--max-tokens", type=whole(2), default=128, help="of every answer; default 128")
    add("--temperature", type=not_negative, default=0.0, help="default 0: greedy")
    add(
        "--num-prompts",
        type=whole(1),
        metavar="N",
        help="per round; default: the batch size, at least 12, in whole batches",
    )
    add(
        "--prompt-sets",
        type=_names,
        default=["not_looping", "all"],
        help="not_looping leaves out prompts whose plain answer goes round in circles, "
        "which flatters drafting; default not_looping,all",
    )
    add("--max-model-len", type=whole(1), default=1024, help="default 1024")
    parser.set_defaults(run=_decode)


def _add_prefill(kinds: "_Commands") -> None:
    parser = kinds.add_parser(
        "prefill",
        help="time to the first token over dense prefill, by prompt length",
        description="One request at a time; methods take turns round by round, "
        "dense prefill twice (`dense_again`: what noise does to a ratio).",
    )
    add = parser.add_argument
    _add_common(parser, methods="dense")
    add(
        "--prompt-lengths",
        type=_wholes,
        default=[1024, 4096, 8192],
        metavar="N,...",
        help="tokens, the answer included; default 1024,4096,8192",
    )
    add(
        "--tasks",
        type=Path,
        metavar="FILE",
        help="JSONL of `prompt` and `answer` instead of tasks made at each length",
    )
    add(
        "--questions",
        type=whole(1),
        default=24,
        help="per length, shared out to the rounds; default 24",
    )
    add(
        "--max-tokens",
        type=whole(8),
        metavar="N",
        help="of every answer, to time whole answers too; default: an answer's own length",
    )
    add(
        "--lazyllm",
        type=json_object,
        default={},
        metavar="JSON",
        help='settings for lazyllm, such as {"keep": 0.3}; '
        "random-drop and static-prune keep as much",
    )
    add("--max-model-len", type=whole(1), help="default: the longest prompt and answer")
    parser.set_defaults(run=_prefill)


def _add_common(parser: argparse.ArgumentParser, methods: str) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add(
        "--methods",
        type=_names,
        default=_names(methods),
        help=f"default {methods}; {methods.partition(',')[0]} always runs",
    )
    add("--rounds", type=whole(1), default=5, help="default 5")
    add("--output", required=True, type=Path, help="JSON file to write")
    add(
        "--kv-cache-memory-bytes",
        type=whole(1),
        default=_KV_CACHE_BYTES,
        metavar="N",
        help=f"of each engine; default {_KV_CACHE_BYTES}",
    )
    add("--dtype", default="auto", help="of each engine; default: the model's own")


def _add_report(kinds: "_Commands") -> None:
    parser = kinds.add_parser("report", help="one page of what a bench wrote")
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="OUT.json")
    add("--html", required=True, type=Path, help="page to write; needs no network")
    add("--png", type=Path, help="its pictures as one image")
    parser.set_defaults(run=_report)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _wholes(text: str) -> list[int]:
    return sorted({whole(1)(part) for part in text.split(",")})
