"""Off means off: installed and not switched on, only the door is there."""

import pytest

pytestmark = pytest.mark.engine

DESCRIBE = """
import dataclasses, json, sys
import vllm.plugins
vllm.plugins.load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(
    model=sys.argv[1], enforce_eager=True, skip_tokenizer_init=True
).create_engine_config()
volatile = ("instance_id", "shutdown_fence", "timestamp")

def plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
                if f.name not in volatile}
    if isinstance(value, dict):
        return {str(k): repr(v) for k, v in value.items()}
    return repr(value)

ours = sorted(m for m in sys.modules if m.startswith("vllm_accel"))
print("RESULT", json.dumps({"config": plain(config), "modules": ours}))
"""

CHANGED = """
import importlib, json, sys
import vllm.engine.arg_utils, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
import vllm.v1.core.sched.scheduler, vllm.entrypoints.llm

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vllm":
            continue
        for key, value in vars(module).items():
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found.update({(name, key, k): id(v) for k, v in vars(value).items()})
    return found

before = attributes()
from vllm_accel.plugin import register
register()
register()
after = attributes()
from vllm_accel.host.door import close_door
close_door()
closed = attributes()
different = lambda now: sorted(".".join(k) for k in before if now[k] != before[k])
print("RESULT", json.dumps([different(after), different(closed)]))
"""


@pytest.fixture
def describe(printed, tiny):
    return lambda **env: printed(["-c", DESCRIBE, tiny[0]], env=env)


def test_the_config_is_the_one_of_a_vllm_without_plugins(describe):
    with_door = describe()
    without = describe(VLLM_PLUGINS="")
    assert with_door["config"] == without["config"]
    assert without["modules"] == []
    assert [m for m in with_door["modules"] if ".host." in m] == [
        "vllm_accel.host.door",
        "vllm_accel.host.hooks",
        "vllm_accel.host.hooks.cli_names",
        "vllm_accel.host.hooks.speculative_config",
    ]


def test_a_variable_keeps_the_door_shut(describe):
    closed = describe(VLLM_ACCEL_DISABLE="1")
    assert [m for m in closed["modules"] if ".host" in m] == []


def test_no_other_attribute_of_vllm_is_replaced(printed):
    changed, after_removal = printed(["-c", CHANGED])
    assert changed == [
        "vllm.engine.arg_utils.EngineArgs.add_cli_args",
        "vllm.engine.arg_utils.EngineArgs.create_speculative_config",
    ]
    assert after_removal == []


WORKER = """
import json, os, sys
def modules(worker):
    return sorted(m for m in sys.modules if m.startswith("vllm_accel.host."))
if __name__ == "__main__":
    from vllm import LLM
    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=2**26,
        skip_tokenizer_init=True,
    )
    seen = llm.collective_rpc(modules)[0]
    print("RESULT", json.dumps(seen))
"""


def test_a_worker_of_an_engine_that_is_off_loads_the_door_only(printed, tiny, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    assert printed([script, tiny[0]], env=env) == [
        "vllm_accel.host.door",
        "vllm_accel.host.hooks",
        "vllm_accel.host.hooks.cli_names",
        "vllm_accel.host.hooks.speculative_config",
    ]
