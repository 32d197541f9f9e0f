"""A batch from prompts to output, with engines that are a function."""

import json
import os
from contextlib import contextmanager

import pytest

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
pytest.importorskip("pyarrow")

from pyarrow import parquet

from vllm_accel.errors import AccelError
from vllm_accel.ray import batch, cluster
from vllm_accel.ray.batch import BatchPlan
from vllm_accel.ray.cluster import Where
from vllm_accel.ray.rows import Outcome
from vllm_accel.ray.settings import ReplicaSettings

ROWS = 40


class Letters:
    def encode(self, text, *, add_special_tokens=True):
        return [ord(letter) for letter in text]


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(ROWS)))
    settings = ReplicaSettings(model="m", replicas=2, accelerator="cpu", threads=1)
    output = tmp_path / "out.parquet"
    return BatchPlan(settings=settings, input=file, output=output, flush_rows=4)


@pytest.fixture
def engines(monkeypatch):
    """engines(answer): `answer(plan, prompts)` stands for Ray Data and all engines."""

    @contextmanager
    def connected(where):
        yield

    monkeypatch.setattr(cluster, "connected", connected)
    monkeypatch.setattr(cluster, "fitted", lambda settings: settings)
    monkeypatch.setattr(batch, "_tokenizer", lambda settings: Letters())
    return lambda answer: monkeypatch.setattr(batch, "_outcomes", answer)


def answered(prompt, error=""):
    return Outcome(prompt.row, prompt.text.upper(), prompt.token_ids, 2, 2, error)


def everything(plan, prompts):
    yield from map(answered, reversed(prompts))


def rows_of(plan):
    return parquet.read_table(plan.output).to_pylist()


def test_every_row_is_there_once_and_in_order(plan, engines):
    engines(everything)
    assert batch.run(plan, Where()) == 0
    assert [row["row"] for row in rows_of(plan)] == list(range(ROWS))
    assert [row["text"] for row in rows_of(plan)] == [f"P{n}" for n in range(ROWS)]


def test_an_interrupted_batch_keeps_what_it_had_and_goes_on(plan, engines):
    def interrupted(plan, prompts):
        yield from map(answered, prompts[:10])
        raise KeyboardInterrupt

    asked = []

    def rest(plan, prompts):
        asked.extend(prompt.row for prompt in prompts)
        return everything(plan, prompts)

    engines(interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.run(plan, Where())
    assert not plan.output.exists()
    engines(rest)
    assert batch.run(plan, Where()) == 0
    assert asked == list(range(10, ROWS))
    assert len(rows_of(plan)) == ROWS


def test_rows_an_engine_took_with_it_are_asked_again(plan, engines):
    passes = []

    def dying(plan, prompts):
        passes.append(len(prompts))
        for prompt in prompts:
            lost = len(passes) == 1 and prompt.row % 4 == 0
            yield answered(prompt, "EngineDeadError: EngineCore" if lost else "")

    engines(dying)
    assert batch.run(plan, Where()) == 0
    assert passes == [ROWS, ROWS // 4]
    assert {row["error"] for row in rows_of(plan)} == {""}


def test_a_row_the_engine_refuses_is_an_error_and_not_asked_again(plan, engines):
    passes = []

    def refusing(plan, prompts):
        passes.append(len(prompts))
        for prompt in prompts:
            yield answered(prompt, "ValueError: too long" if prompt.row == 7 else "")

    engines(refusing)
    assert batch.run(plan, Where()) == 1
    assert passes == [ROWS]
    assert rows_of(plan)[7]["error"] == "ValueError: too long"


def test_engines_that_never_answer_are_given_up_and_the_rest_is_kept(plan, engines):
    def deaf(plan, prompts):
        yield from (answered(prompt) for prompt in prompts if prompt.row != 5)

    engines(deaf)
    with pytest.raises(AccelError, match=f"1 of {ROWS} rows have no answer"):
        batch.run(plan, Where())
    engines(everything)
    assert batch.run(plan, Where()) == 0


def test_progress_is_told(plan, engines, capsys, monkeypatch):
    monkeypatch.setattr(batch.Progress, "every_s", 0.0)
    engines(everything)
    batch.run(plan, Where())
    said = capsys.readouterr().err
    assert said.startswith(f"vllm-accel: {ROWS} rows; starting engines\n")
    assert f"vllm-accel: 20 of {ROWS} rows, " in said


def test_on_cpu_engines_ask_for_fractions_and_no_other_stage_for_anything(plan):
    args = batch.processor_args(plan)
    assert args["placement_group_config"] == {"bundles": [{"CPU": 0.5}]}
    assert args["concurrency"] == (2, 2)
    stages = [args[f"{name}_stage"] for name in ("chat_template", "tokenize", "detokenize")]
    assert stages == [False] * 3
    assert args["engine_kwargs"]["distributed_executor_backend"] == "mp"


def test_ray_data_takes_what_we_build(plan):
    pytest.importorskip("ray")
    from ray.data.llm import vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(**batch.processor_args(plan))
    assert config.get_concurrency() == {"min_size": 2, "max_size": 2}
    assert config.should_continue_on_error


def test_rows_through_rays_own_wrappers():
    """Into the engine's stage and out of it, for an answer and for a refused row."""
    pytest.importorskip("ray")
    from ray.llm._internal.batch.stages.base import wrap_postprocess, wrap_preprocess
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMOutputData

    row = {"row": 3, "token_ids": [5, 6], "sampling": '{"max_tokens": 2}'}
    into = wrap_preprocess(batch.engine_input, "data")(row)["data"]
    assert into["tokenized_prompt"] == [5, 6]
    assert into["sampling_params"] == {"max_tokens": 2}
    said = vLLMOutputData(
        prompt="",
        num_input_tokens=2,
        generated_tokens=[7],
        generated_text="x",
        num_generated_tokens=1,
    ).model_dump()
    out = wrap_postprocess(batch.engine_output, "data", include_error_column=True)
    answer = out({"data": {**into, **said, "__inference_error__": ""}})
    assert batch.outcome_of(answer) == Outcome(3, "x", [7], 2, 1, "")
    refused = out({"data": {**into, "__inference_error__": "ValueError: no"}})
    assert batch.outcome_of(refused) == Outcome(3, "", [], 0, 0, "ValueError: no")
