"""patches/ledger.toml tells the truth about the installed vLLM and about our code."""

import ast
import importlib.util
import re
from pathlib import Path

import ledger  # patches/ is on pytest's path
import ledger_laws
import pytest
from ledger_laws import ROOT

HOST = ROOT / "vllm_accel" / "host"
DIFFS = sorted((ROOT / "patches" / "upstream").glob("*.patch"))

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
MODEL_CONFIG = "vllm.config.model:ModelConfig"
PARALLEL_CONFIG = "vllm.config.parallel:ParallelConfig"
VLLM_CONFIG = "vllm.config.vllm:VllmConfig"
INPUT_BATCH = "vllm.v1.worker.gpu_input_batch"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
BLOCK_MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
KV_SPECS = "vllm.v1.kv_cache_interface"
STAT_LOGGERS = "vllm.v1.metrics.loggers"
CPU_WORKERS = [
    "vllm.v1.worker.cpu_worker:CPUWorker",
    "vllm.v1.worker.gpu_worker:Worker",
    "vllm.v1.worker.worker_base:WorkerBase",
]

OUR_CLASSES = {
    "v1/runner.py:DraftingRunnerMixin": [RUNNER],
    "v1/runner.py:CerberusRunnerMixin": [RUNNER],
    "v1/free_runner.py:FreeRunnerMixin": [RUNNER],
    "v1/seeds.py:SeededChunksMixin": [RUNNER],
    "v1/scheduler.py:AccelScheduler": [
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        SCHEDULER,
    ],
    "v1/cpu_worker.py:AccelCPUWorker": CPU_WORKERS,
    "v1/gpu_worker.py:AccelGPUWorker": [
        "vllm.v1.worker.gpu_worker:Worker",
        "vllm.v1.worker.worker_base:WorkerBase",
    ],
    "engines.py:_PoolUse": [
        f"{STAT_LOGGERS}:AggregateStatLoggerBase",
        f"{STAT_LOGGERS}:StatLoggerBase",
    ],
    "v1/lazyllm/cpu_worker.py:LazyCPUWorker": CPU_WORKERS,
    "v1/lazyllm/runner.py:LazyRunnerMixin": [
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
        RUNNER,
    ],
    "v1/lazyllm/scheduler.py:PruningMixin": [SCHEDULER],
    "v1/lazyllm/scheduler.py:LazyScheduler": [SCHEDULER],
    "v1/lazyllm/kv_groups.py:SpanSpec": [
        f"{KV_SPECS}:{name}"
        for name in ("FullAttentionSpec", "AttentionSpec", "KVCacheSpec")
    ],
    "v1/lazyllm/kv_groups.py:SpanManager": [
        f"{BLOCK_MANAGERS}:FullAttentionManager",
        f"{BLOCK_MANAGERS}:SingleTypeKVCacheManager",
    ],
    "v1/lazyllm/attention.py:SpanMetadata": [f"{CPU_ATTENTION}:CPUAttentionMetadata"],
    "v1/lazyllm/attention.py:SpanMetadataBuilder": [
        f"{CPU_ATTENTION}:CPUAttentionMetadataBuilder"
    ],
    "v1/lazyllm/attention.py:SpanAttentionImpl": [
        f"{CPU_ATTENTION}:CPUAttentionBackendImpl"
    ],
    "v1/lazyllm/attention.py:SpanAttentionBackend": [
        f"{CPU_ATTENTION}:CPUAttentionBackend"
    ],
}
"""Our classes that take the place of vLLM's, and those, the nearest base first."""

VLLM_OBJECTS = {
    "current_platform": "vllm.platforms.interface:Platform.",
    "engine_args": ENGINE_ARGS + ".",
    "envs": "vllm.envs:",
    "model_config": MODEL_CONFIG + ".",
    "parallel_config": PARALLEL_CONFIG + ".",
    "rejection_sampler": "vllm.v1.sample.rejection_sampler:",
    "sampling_metadata": "vllm.v1.sample.metadata:SamplingMetadata.",
    "self._engine": "vllm.v1.engine.llm_engine:LLMEngine.",
    "self._llm": "vllm.entrypoints.llm:LLM.",
    "scheduler_output": "vllm.v1.core.sched.output:SchedulerOutput.",
    "self._model_config": MODEL_CONFIG + ".",
    "self.input_batch": INPUT_BATCH + ":InputBatch.",
    "self.scheduler_config": "vllm.config.scheduler:SchedulerConfig.",
    "spec_decode_metadata": "vllm.v1.spec_decode.metadata:SpecDecodeMetadata.",
    "state": INPUT_BATCH + ":CachedRequestState.",
    "state.sampling_params": "vllm.sampling_params:SamplingParams.",
    "vllm": "vllm:",
    "vllm_config": VLLM_CONFIG + ".",
    "vllm_config.model_config": MODEL_CONFIG + ".",
    "vllm_config.parallel_config": PARALLEL_CONFIG + ".",
}
"""Names our code gives to vLLM's objects, and what they are."""

ADD = "add it to patches/ledger.toml, see patches/README.md"


TOUCHES = ledger.load()
TARGETS = {touch.target for touch in TOUCHES}
MEETINGS = {(touch.where, touch.target) for touch in TOUCHES}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="the ledger is about vLLM"
)


def by_name(value):
    return ledger_laws.by_id(value) or Path(str(value)).stem


@pytest.mark.parametrize("touch", TOUCHES, ids=by_name)
def test_the_target_is_as_it_was_when_we_read_it(touch):
    ledger_laws.check_target(touch)


@pytest.mark.parametrize("touch", TOUCHES, ids=by_name)
def test_our_side_of_a_touch_exists(touch):
    ledger_laws.check_our_side(touch)


def test_every_entry_says_what_it_must():
    kinds = {"H": "hook", "S": "seam", "O": "override"}
    processes = ("main", "engine", "worker", "every", "doctor")
    ledger_laws.check_entries(TOUCHES, kinds, processes)
    assert all(touch.diff for touch in TOUCHES if touch.kind == "hook")


def test_the_ledger_is_about_the_supported_version():
    supported = ledger.defined_in(HOST / "compat.py", "SUPPORTED")[0].value.value
    assert {touch.versions for touch in TOUCHES} == {supported}


def test_check_passes(capsys):
    ledger_laws.check_passes(ledger.HERE / "ledger.toml", TOUCHES, capsys)


# Diffs


@pytest.mark.parametrize("diff", DIFFS, ids=by_name)
def test_diff_applies_and_leaves_valid_python(diff, tmp_path):
    assert ledger.apply(diff, tmp_path) == ""
    changed = list(tmp_path.rglob("*.py"))
    assert changed
    for file in changed:
        ast.parse(file.read_text())


@pytest.mark.parametrize("diff", DIFFS, ids=by_name)
def test_diff_names_the_entries_it_removes(diff):
    named = re.search(r"^Removes from the ledger: (.*)$", diff.read_text(), re.M)
    theirs = [touch.id for touch in TOUCHES if touch.diff == f"upstream/{diff.name}"]
    assert named.group(1).split() == theirs


def test_every_diff_of_an_entry_exists():
    diffs = {f"upstream/{diff.name}" for diff in DIFFS}
    assert {touch.diff for touch in TOUCHES} - {""} == diffs


def test_a_diff_that_does_not_apply_is_told(tmp_path):
    diff = tmp_path / "stale.patch"
    stale = DIFFS[1].read_text().replace("def init_device", "def start_device")
    diff.write_text(stale)
    assert "patch does not apply" in ledger.apply(diff, tmp_path / "copy")


# Fingerprints


CODE = '''
class Host:
    """Says hello."""

    limit: int = 3

    def greet(self, name="you"):
        """Greets."""
        # politely
        self.greeted = name
        return f"hello {name}"
'''


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """Fingerprint of a target in a temporary module of the given code."""
    package = tmp_path / "ledger_test_host"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def of(target, code):
        (package / "module.py").write_text(code)
        return ledger.fingerprint(f"ledger_test_host.module:{target}")

    return of


@pytest.mark.parametrize("target", ["Host", "Host.greet"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Greets.", "Greets somebody."),
        ('        """Greets."""\n', ""),
        ("# politely", "# very politely"),
        ('f"hello {name}"', "(f'hello {name}')"),
    ],
)
def test_documentation_and_layout_do_not_change_a_fingerprint(
    fingerprint, target, old, new
):
    assert fingerprint(target, CODE.replace(old, new)) == fingerprint(target, CODE)


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("Host.greet", "hello", "goodbye"),
        ("Host.greet", 'name="you"', "name"),
        ("Host.limit", "3", "4"),
        ("Host.greeted", "= name", "= name.lower()"),
        ("Host", "Host:", "Host(Base):"),
    ],
)
def test_code_changes_a_fingerprint(fingerprint, target, old, new):
    assert fingerprint(target, CODE.replace(old, new)) != fingerprint(target, CODE)


@pytest.mark.parametrize("target", ["Guest", "Host.leave", "Guest.greet", "greeted"])
def test_a_missing_target_is_an_error(fingerprint, target):
    with pytest.raises(ledger.LedgerError, match=target):
        fingerprint(target, CODE)


def test_a_missing_module_is_an_error():
    with pytest.raises(ledger.LedgerError, match=r"no_such_package\.module"):
        ledger.fingerprint("no_such_package.module:name")


# Nothing of vLLM is touched without an entry


def our_files():
    return sorted(file for file in HOST.rglob("*.py") if file.name != "__init__.py")


def relative(file):
    return file.relative_to(ROOT).as_posix()


def imported_from_vllm(file):
    """Names a file imports from vLLM, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and re.match(r"vllm\b", node.module or ""):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if re.match(r"vllm\b", a.name)}
    return names


@pytest.mark.parametrize("file", our_files(), ids=by_name)
def test_what_a_file_imports_from_vllm_has_an_entry(file):
    files = {where.partition(":")[0] for where, _ in MEETINGS}
    modules = {target.partition(":")[0].split(".")[-1] for target in TARGETS}
    roots = {target.partition(":")[2].split(".")[0] for target in TARGETS}
    for name in imported_from_vllm(file):
        assert relative(file) in files, ADD
        assert name in roots | modules | VLLM_OBJECTS.keys(), ADD


@pytest.mark.parametrize("file", sorted((HOST / "hooks").glob("[!_]*.py")), ids=by_name)
def test_a_hook_has_an_entry(file):
    hooks = {touch.where for touch in TOUCHES if touch.kind == "hook"}
    assert f"{relative(file)}:apply" in hooks, ADD


def base_of(name, bases):
    """The nearest base that defines a name, as a target."""
    for base in bases:
        module, _, cls = base.partition(":")
        if ledger.defined_in(ledger.source_file(module), f"{cls}.{name}"):
            return f"{base}.{name}"
    return None


def attributes_of_self(cls):
    """Names after `self.`, in any method."""
    nodes = [node for node in ast.walk(cls) if isinstance(node, ast.Attribute)]
    return sorted({node.attr for node in nodes if ast.unparse(node.value) == "self"})


@pytest.mark.parametrize("ours", OUR_CLASSES)
def test_an_overridden_method_has_an_entry(ours):
    file, _, name = ours.partition(":")
    (cls,) = ledger.defined_in(HOST / file, name)
    for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
        target = base_of(method.name, OUR_CLASSES[ours])
        where = f"{relative(HOST / file)}:{name}.{method.name}"
        assert target is None or (where, target) in MEETINGS, ADD


@pytest.mark.parametrize("ours", OUR_CLASSES)
def test_an_attribute_shared_with_vllm_has_an_entry(ours):
    file, _, name = ours.partition(":")
    (cls,) = ledger.defined_in(HOST / file, name)
    for attribute in attributes_of_self(cls):
        target = base_of(attribute, OUR_CLASSES[ours])
        assert target is None or target in TARGETS, ADD


def test_every_class_in_the_place_of_vllms_is_known_here():
    found = set()
    for file in our_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and is_vllms(node, file):
                found.add(f"{file.relative_to(HOST).as_posix()}:{node.name}")
    mixins = {ours for ours in OUR_CLASSES if ours.endswith("Mixin")}
    assert found | mixins == set(OUR_CLASSES)


def is_vllms(cls, file):
    """Whether a class of this file derives from something imported from vLLM."""
    imported = imported_from_vllm(file)
    return any(ast.unparse(base).split(".")[0] in imported for base in cls.bases)


@pytest.mark.parametrize("file", our_files(), ids=by_name)
def test_what_we_read_of_vllms_objects_has_an_entry(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in VLLM_OBJECTS:
            target = VLLM_OBJECTS[ast.unparse(node.value)] + node.attr
            assert target in TARGETS, ADD
