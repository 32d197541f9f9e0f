"""A tiny base model and heads for it, written once."""

import pytest

from vllm_accel.testing import write_tiny_model, write_untrained_heads


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def heads_folder(tmp_path, tiny_model):
    return write_untrained_heads(tmp_path / "heads", tiny_model, noise=0.1)
