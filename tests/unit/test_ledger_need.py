"""What upstream no longer needs from us goes: every hook proves that it is needed."""

import ast
import importlib.util
from pathlib import Path

import ledger  # patches/ is on pytest's path
import pytest

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
DIFFS = sorted((Path(ledger.__file__).parent / "upstream").glob("*.patch"))
TOUCHES = ledger.load()

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="the ledger is about vLLM"
)


def says(target, text):
    return text in ledger.source(target)


def methods_are_a_closed_list():
    annotation = ledger.source("vllm.config.speculative:SpeculativeConfig.method")
    names = ledger.source("vllm.config.speculative:SpeculativeMethod")
    return "| str" not in annotation and "cerberus" not in names


def nobody_asks_for_amx():
    worker = ledger.source_file("vllm.v1.worker.cpu_worker").read_text()
    return "_init_amx" not in worker


def cpu_expand_drops_its_output():
    code = ledger.source("vllm.utils.cpu_triton_utils:_expand_kernel_impl")
    return "_ensure_int64(output)" in code and "copy_" not in code


def custom_class_gets_tokens_only():
    code = ledger.source(f"{RUNNER}.propose_draft_token_ids")
    branch = code.partition("spec_config.method == 'custom_class'")[2]
    return "hidden_states" not in branch.partition("elif")[0]


def the_sampler_is_chosen_by_metadata_alone():
    code = ledger.source(f"{RUNNER}._sample")
    return "if spec_decode_metadata is None:" in code and "num_draft_tokens" not in code


def step_output_has_no_field_for_plugins():
    (output,) = ledger.definitions("vllm.v1.outputs:ModelRunnerOutput")
    fields = [ast.unparse(n) for n in output.body if isinstance(n, ast.AnnAssign)]
    return not any("Any" in field or "plugin" in field for field in fields)


JSON_ONLY = "['speculative_config']['type'] = optional_type(json.loads)"
PADDED = "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None"
CPU_INIT_DEVICE = "vllm.v1.worker.cpu_worker:CPUWorker.init_device"


def the_engine_core_never_waits_for_drafts():
    code = ledger.source("vllm.v1.engine.core:EngineCore.step_with_batch_queue")
    return "awaits_output" not in code


STILL_NEEDED = {
    "H01": lambda: says(f"{ENGINE_ARGS}.add_cli_args", JSON_ONLY),
    "H02": methods_are_a_closed_list,
    "H03": nobody_asks_for_amx,
    "H04": cpu_expand_drops_its_output,
    "H05": the_engine_core_never_waits_for_drafts,
    "O01": the_sampler_is_chosen_by_metadata_alone,
    "O03": lambda: says(f"{RUNNER}._input_fits_in_drafter", ".max_seq_len"),
    "O04": custom_class_gets_tokens_only,
    "O06": step_output_has_no_field_for_plugins,
    "O07": lambda: says(CPU_INIT_DEVICE, "= CPUModelRunner("),
    "O31": lambda: says(f"{SCHEDULER}.schedule", PADDED),
    "O92": lambda: says(f"{RUNNER}._bookkeeping_sync", ".set_offset("),
}
"""What in upstream's source makes each of these necessary."""


@pytest.mark.parametrize("touch_id", STILL_NEEDED)
def test_the_touch_is_still_needed(touch_id):
    (touch,) = [touch for touch in TOUCHES if touch.id == touch_id]
    assert STILL_NEEDED[touch_id](), f"remove {touch.where}: {touch.remove_when}"


def test_every_hook_has_a_proof_of_need():
    hooks = {touch.id for touch in TOUCHES if touch.kind == "hook"}
    assert hooks <= STILL_NEEDED.keys()


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_once_merged_a_diff_makes_its_touches_unneeded(diff, tmp_path, monkeypatch):
    assert ledger.apply(diff, tmp_path) == ""
    installed = ledger.source_file

    def merged(module):
        file = tmp_path / f"{module.replace('.', '/')}.py"
        return file if file.is_file() else installed(module)

    monkeypatch.setattr(ledger, "source_file", merged)
    theirs = [touch.id for touch in TOUCHES if touch.diff == f"upstream/{diff.name}"]
    proven = [touch_id for touch_id in theirs if touch_id in STILL_NEEDED]
    assert proven
    assert not any(STILL_NEEDED[touch_id]() for touch_id in proven)
