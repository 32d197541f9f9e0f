"""Settings that change what an engine does, together in one engine."""

import pytest

from vllm_accel import engine_args
from vllm_accel.testing import write_untrained_heads

pytestmark = pytest.mark.engine


@pytest.fixture
def foreign_heads(tiny, tmp_path):
    """Heads that fit, but say they belong to another model."""
    from pathlib import Path

    return write_untrained_heads(
        tmp_path / "heads", Path(tiny[0]), base_fingerprint="0" * 16
    )


def test_fewer_drafts_unchecked_base_no_queue_and_a_scheduler_of_ones_own(
    generate, tiny, foreign_heads
):
    greedy = {"temperature": 0.0, "max_tokens": 30, "detokenize": False}
    batch = {"prompts": [[7] * 20], "sampling": [greedy]}
    engine = {"model": tiny[0], "skip_tokenizer_init": True, "dtype": "float32"}
    cerberus = engine_args(
        "cerberus",
        model=str(foreign_heads),
        num_speculative_tokens=2,
        gate="vllm_accel.testing:StretchGate",
        run_ahead=False,
        check_base=False,
    )
    derived = {"scheduler_cls": "vllm_accel.host.v1.scheduler.AccelScheduler"}
    plain = generate(engine, [batch])
    ours = generate(engine | cerberus | derived, [batch], processes=True)
    assert ours["batches"] == plain["batches"]
    reasons = {k for k in ours["metrics"] if "accel_gate_decisions" in k}
    assert any("reason=stretch|state=closed" in k for k in reasons)
    assert not any("reason=ahead" in k for k in reasons)
    lengths = {k[-1] for k in ours["metrics"] if "accel_draft_length" in k}
    assert lengths == {"0", "1", "2"}
