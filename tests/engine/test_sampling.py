"""Above temperature 0 the target's distribution is kept, and greedy neighbours too."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vllm_accel.testing import write_tiny_model, write_untrained_heads

pytestmark = pytest.mark.engine

VOCAB = 12
PROMPT = [1, 2, 3]
SAMPLES = 6000
TOKENS = 4


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory):
    """A tiny model that likes to repeat itself, so that heads of zeros are often right,
    and configs of the methods for it."""
    folder = tmp_path_factory.mktemp("sampling")
    model = write_tiny_model(folder / "model", vocab_size=VOCAB, scale=0.2, seed=2)
    heads = write_untrained_heads(folder / "heads", model)
    return model, {
        "cerberus": {
            "method": "cerberus",
            "model": str(heads),
            "gate": "vllm_accel.testing:StretchGate",
        },
        "free": {
            "method": "free",
            "exit_layer": 1,
            "gate": "vllm_accel.testing:RandomExitGate",
        },
    }


@torch.no_grad()
def exact_probabilities(model):
    """[VOCAB ** TOKENS] of every continuation, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    paths = torch.cartesian_prod(*[torch.arange(VOCAB)] * TOKENS)
    ids = torch.cat([torch.tensor(PROMPT).expand(len(paths), -1), paths], dim=1)
    log_probs = torch.cat(
        [reference(part).logits.log_softmax(dim=-1) for part in ids.split(2048)]
    )
    first = len(PROMPT) - 1
    steps = log_probs[:, first : first + TOKENS].gather(2, paths[..., None])
    return steps.sum(dim=(1, 2)).exp().numpy()


@pytest.mark.parametrize("method", ["cerberus", "free"])
def test_sampled_tokens_follow_the_targets_distribution(generate, repetitive, method):
    model, configs = repetitive
    sampling = {"temperature": 1.0, "max_tokens": TOKENS, "detokenize": False}
    engine = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 64,
        "speculative_config": configs[method],
    }
    batch = {"prompts": [PROMPT] * SAMPLES, "sampling": [sampling] * SAMPLES}
    result = generate(engine, [batch], processes=True)
    ahead = "vllm:accel_gate_decisions|reason=ahead|state=closed"
    assert result["metrics"][ahead] > 0
    assert result["metrics"]["vllm:accel_accepted_tokens"] > SAMPLES / 20
    weights = VOCAB ** np.arange(TOKENS)[::-1]
    drawn = [int(np.dot(r["token_ids"], weights)) for r in result["batches"][0]]
    observed = np.bincount(drawn, minlength=VOCAB**TOKENS)
    expected = exact_probabilities(model) * SAMPLES
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert len(expected) > 50
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("method", ["cerberus", "free"])
def test_a_greedy_request_beside_sampled_ones_keeps_its_tokens(
    generate, repetitive, method
):
    model, configs = repetitive
    engine = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 64,
    }
    always = {"speculative_config": configs[method] | {"gate": "always"}}
    greedy = {"temperature": 0.0, "max_tokens": 40, "detokenize": False}
    sampled = greedy | {"temperature": 1.0}
    batch = {"prompts": [PROMPT] * 8, "sampling": [greedy, sampled] * 4}
    plain = generate(engine, [batch])["batches"][0]
    ours = generate(engine | always, [batch])["batches"][0]
    tokens = [[r["token_ids"] for r in rows[::2]] for rows in (plain, ours)]
    assert tokens[0] == tokens[1]
