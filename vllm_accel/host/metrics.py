"""Counters from the engine's process to `/metrics` and `LLM.get_metrics()`.

The scheduler adds to a counter file in prometheus_client's multiprocess format; process
0 reads it when scraped. With `--api-server-count` above 1 vLLM already serves such a
folder, and the file goes there. Why this way: docs/decisions/0002.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import VllmConfig

FOLDER_VARIABLE = "ACCEL_METRICS_DIR"
"""Set by process 0, inherited by the engine's processes. Not named VLLM_*: vLLM warns of
variables it does not know."""

_FILES = "counter_accel-*.db"
_WRITE_EVERY_S = 0.25

HELP = {
    "vllm:accel_gate_decisions": "Gate decisions, one per decoding request and step.",
    "vllm:accel_draft_length": "Decoding requests and steps by tokens drafted.",
    "vllm:accel_drafted_tokens": "Draft tokens the target verified.",
    "vllm:accel_accepted_tokens": "Draft tokens the target agreed with.",
    "vllm:accel_final_tokens": "Output tokens that left at free's exit, in mode exit.",
    "vllm:accel_final_agreed_tokens": "Those the deep layers would have chosen too.",
    "vllm:accel_draft_seconds": "Time spent deciding whether to draft and drafting.",
    "vllm:accel_layer_rows": "Rows of decoding requests, times the layers they ran.",
    "vllm:accel_request_steps": "Steps in which a request was given output tokens.",
    "vllm:accel_output_tokens": "Output tokens given to requests.",
    "vllm:accel_prompts": "Prompts started, by whether some of it may be pruned.",
    "vllm:accel_prompt_pages": "Pages of prompts parked, revived, given back, declined.",
    "vllm:accel_span_rows": "Token rows run by each span of layers.",
}


class CounterFile:
    """Counters of one engine that any process may read.

    Args:
        vllm_config: names the model and engine in the labels, as vLLM's metrics do.
        method: label of the method that counts.
    """

    def __init__(self, vllm_config: VllmConfig, method: str) -> None:
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        folder = shared or os.environ.get(FOLDER_VARIABLE)
        engine = vllm_config.parallel_config.data_parallel_index
        self._labels = {
            "model_name": vllm_config.model_config.served_model_name,
            "engine": str(engine),
            "method": method,
        }
        self._keys: dict[tuple[str, ...], str] = {}
        self._waiting: Counter[str] = Counter()
        self._written = time.monotonic()
        name = _FILES.replace("*", f"{os.getpid()}-{engine}-{method}")
        self._values = MmapedDict(str(Path(folder) / name)) if folder else None

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Adds to one counter; `name` is a key of `HELP`. Seen after the next `write`."""
        if self._values is not None and amount:
            self._waiting[self._key(name, labels)] += amount

    def write(self, *, busy: bool) -> None:
        """Makes what was added visible: at once, or four times a second while busy.

        A file write per counter and step would be felt in short steps.
        """
        now = time.monotonic()
        if busy and now - self._written < _WRITE_EVERY_S:
            return
        self._written = now
        for key, amount in self._waiting.items():
            value, _ = self._values.read_value(key)
            self._values.write_value(key, value + amount, 0.0)
        self._waiting.clear()

    def _key(self, name: str, labels: dict[str, str]) -> str:
        """The file's key of a counter; made once, it is JSON."""
        known = (name, *labels.values())
        if known not in self._keys:
            all_labels = self._labels | labels
            self._keys[known] = mmap_key(
                name, f"{name}_total", list(all_labels), all_labels.values(), HELP[name]
            )
        return self._keys[known]


class _Reader:
    """What process 0 registers: the newest engine's counters, read at every scrape."""

    def __init__(self) -> None:
        self.folder = Path()

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read files."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The newest engine's."""
        return read(self.folder)


def read(folder: Path) -> Iterable[Metric]:
    """Our own files only: others in the folder have their own way out."""
    files = [str(f) for f in folder.glob(_FILES) if f.stat().st_size]
    metrics: Iterable[Metric] = MultiProcessCollector.merge(files)
    return metrics


_reader = _Reader()


def newest_folder() -> Path:
    """Of the engine of ours started last in this process."""
    return _reader.folder


def open_reader() -> None:
    """Makes the counters of the engine started next visible in this process."""
    if _reader.folder == Path():
        REGISTRY.register(_reader)
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    folder = shared or tempfile.mkdtemp(prefix="vllm_accel_metrics_")
    if not shared:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[FOLDER_VARIABLE] = folder
    _reader.folder = Path(folder)
