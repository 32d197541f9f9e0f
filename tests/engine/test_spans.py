"""Spans of vLLM's own layers are the whole model: states and cache, to the bit."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("run_spans.py")


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_on_from_kept_states_is_the_whole_model(printed, tmp_path, dtype, how):
    for alike in printed([SCRIPT, tmp_path, dtype, how]).values():
        assert alike["readings"]
        assert alike["deep_layers_untouched"]
        assert alike["on_from_a_reading"]
        assert alike["two_spans_are_the_whole"]
        # In bfloat16 some CPUs' products round by how many rows they have: drafts have two
        # at a time here, the whole ten.
        if dtype == "float32":
            assert alike["from_drafts_too"]
