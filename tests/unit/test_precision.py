"""The float type that training multiplies in."""

import pytest
import torch

from vllm_accel.training.precision import fast_dtype


@pytest.mark.parametrize(
    ("abilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "x"}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_bfloat16_only_where_the_processor_knows_it(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert fast_dtype() == dtype
