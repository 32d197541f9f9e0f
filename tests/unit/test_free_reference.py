"""The laws of FREE, on the reference the engine is compared with."""

import pytest
import torch
from free_reference import Free, ToyLayers, TransformersLayers

from vllm_accel.free import exit_head
from vllm_accel.gating.beta_mixture import NEVER_EXIT, BetaMixture
from vllm_accel.toy import ToyDecoder

PROMPT = [5, 9, 9, 2, 40, 7]
TOKENS = 20
LAYERS = 4


def toy(deep_share=0.3, exit_layer=2, seed=0):
    """A decoder whose layers after the exit change little, so that exits agree at times."""
    decoder = ToyDecoder(num_layers=LAYERS, seed=seed)
    for layer in decoder.layers[exit_layer:]:
        layer.out.weight *= deep_share
        layer.down.weight *= deep_share
    return decoder


def layers(decoder):
    return ToyLayers(decoder, range(1, 40))


def free(decoder, mode, threshold, exit_layer=2, **settings):
    return Free(layers(decoder), exit_layer, mode, threshold, **settings)


@torch.no_grad()
def said_at(decoder, token_ids, exit_layer):
    """Logits [tokens, vocab] at the exit and at the end, nothing cached before."""
    whole = layers(decoder)
    exit_states = whole.run(0, exit_layer, whole.embed(token_ids), 0)
    states = whole.run(exit_layer, LAYERS, exit_states, 0)
    return whole.head().logits(exit_states), whole.head().logits(states)


def plain(decoder, prompt, max_tokens):
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(int(said_at(decoder, token_ids, 2)[1][-1].argmax()))
    return token_ids[len(prompt) :]


def by_confidence(decoder, threshold, exit_layer=2):
    """Mode "exit" without its machinery: each token by whichever depth is asked."""
    token_ids = list(PROMPT)
    for i in range(TOKENS):
        shallow, deep = said_at(decoder, token_ids, exit_layer)
        sure = float(exit_head.ExitSignals(shallow[-1:]).confidence)
        leaves = i > 0 and sure > threshold
        token_ids.append(int((shallow if leaves else deep)[-1].argmax()))
    return token_ids[len(PROMPT) :]


THRESHOLDS = [-1.0, 0.02, 0.1, 0.3, 1.0]


@pytest.mark.parametrize("cap", [None, 1, 3])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_verify_says_what_plain_greedy_decoding_says(exit_layer, threshold, cap):
    decoder = toy(exit_layer=exit_layer)
    method = free(decoder, "verify", threshold, exit_layer, cap=cap)
    answer = method.generate(PROMPT, TOKENS)
    assert answer.token_ids == plain(decoder, PROMPT, TOKENS)
    assert max(answer.drafted) <= (cap or TOKENS)


def test_the_laws_are_tried_on_exits_both_right_and_wrong():
    method = free(toy(), "verify", 0.05)
    answer = method.generate(PROMPT, TOKENS)
    assert 0 < sum(answer.kept) < sum(answer.drafted)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("seed", range(3))
def test_exit_is_each_token_by_its_confidence(seed, threshold):
    decoder = toy(seed=seed)
    answer = free(decoder, "exit", threshold).generate(PROMPT, TOKENS)
    assert answer.token_ids == by_confidence(decoder, threshold)


def test_exit_is_lossy():
    decoder = toy()
    answer = free(decoder, "exit", 0.05).generate(PROMPT, TOKENS)
    assert answer.token_ids != plain(decoder, PROMPT, TOKENS)


def test_a_threshold_no_confidence_reaches_is_plain_decoding_in_either_mode():
    decoder = toy()
    for mode in ("exit", "verify"):
        answer = free(decoder, mode, NEVER_EXIT).generate(PROMPT, TOKENS)
        assert answer.token_ids == plain(decoder, PROMPT, TOKENS)
        assert set(answer.drafted) == {0}
        assert answer.deep_rows == TOKENS - 1


@pytest.mark.parametrize("seed", range(4))
def test_raising_the_threshold_never_exits_more(seed):
    decoder = toy(seed=seed)
    answers = [
        free(decoder, "verify", t).generate(PROMPT, TOKENS)
        for t in (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
    ]
    kept = [sum(answer.kept) for answer in answers]
    assert kept == sorted(kept, reverse=True)
    firsts = [answer.drafted[0] for answer in answers]
    assert firsts == sorted(firsts, reverse=True)
    assert kept[-1] == 0


def off(ours, theirs):
    """Largest difference, per mean size; NaN, which nobody wrote, is to be in both."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    size = theirs.abs().nanmean()
    return float((ours - theirs).nan_to_num().abs().max() / size)


@torch.no_grad()
def test_drafting_writes_what_a_full_pass_writes_and_nothing_deeper():
    token_ids, exit_layer = [5, 9, 9, 2, 40, 7, 3], 2
    drafting, whole = layers(toy()), layers(toy())
    drafting.run(0, LAYERS, drafting.embed(token_ids[:4]), 0)
    before = drafting.toy.kv_cache[exit_layer:].clone()
    for position in range(4, 7):
        row = drafting.embed([token_ids[position]])
        drafting.run(0, exit_layer, row, position)
    whole.run(0, LAYERS, whole.embed(token_ids), 0)
    shallow = drafting.toy.kv_cache[:exit_layer], whole.toy.kv_cache[:exit_layer]
    assert off(*shallow) < 1e-5
    deep = drafting.toy.kv_cache[exit_layer:]
    torch.testing.assert_close(deep, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@torch.no_grad()
def test_going_on_from_kept_states_is_a_full_pass(exit_layer):
    token_ids = [5, 9, 9, 2, 40, 7, 3]
    resumed, whole = layers(toy()), layers(toy())
    resumed.run(0, LAYERS, resumed.embed(token_ids[:3]), 0)
    kept = [
        resumed.run(0, exit_layer, resumed.embed([token_ids[i]]), i) for i in range(3, 7)
    ]
    deep = resumed.run(exit_layer, LAYERS, torch.cat(kept), 3)
    full = whole.run(0, LAYERS, whole.embed(token_ids), 0)[3:]
    assert off(deep, full) < 1e-5
    assert off(resumed.toy.kv_cache, whole.toy.kv_cache) < 1e-5


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_a_shallow_model_that_always_agrees_drafts_to_the_cap(mode):
    decoder = toy(deep_share=0.0)
    answer = free(decoder, mode, 0.0, cap=4).generate(PROMPT, 1 + 5 * 4)
    assert answer.drafted == answer.kept == [4, 4, 4, 4]
    assert answer.token_ids == plain(decoder, PROMPT, 21)


def test_a_shallow_model_that_never_agrees_closes_the_gate():
    method = free(toy(), "verify", BetaMixture("priors"), cap=4)
    shallow = method.layers.head()
    never = exit_head.ExitHead(shallow.adapter, shallow.normed, lambda s: sure_of(s, 63))
    method._shallow = never
    first = method.generate(PROMPT, TOKENS)
    assert sum(first.drafted) > 10
    assert sum(first.kept) == 0
    second = method.generate(PROMPT, TOKENS)
    assert second.threshold == NEVER_EXIT
    assert set(second.drafted) == {0}
    assert second.token_ids == first.token_ids


def sure_of(states, token):
    """Logits of somebody who always says the same."""
    logits = torch.zeros(len(states), 64)
    logits[:, token] = 30.0
    return logits


def test_the_threshold_is_learnt_between_sequences_from_stacks_alone():
    method = free(toy(), "exit", BetaMixture("published"))
    first = method.generate(PROMPT, TOKENS)
    assert first.threshold == method.threshold == 0.9
    method.threshold = 0.05  # so that something is drafted
    seen = method.generate(PROMPT, TOKENS)
    *finished, last = [n + 1 for n in seen.drafted]
    stacked = sum(n for n in finished if n > 1)
    assert len(method.confidence) in (stacked, stacked + last)
    assert method.updates == 0
    method.generate(PROMPT, TOKENS)
    assert method.updates == 1
    assert method.threshold == method.estimator.threshold() != 0.05


def test_after_so_many_updates_the_threshold_stays(monkeypatch):
    monkeypatch.setattr("free_reference.MOST_UPDATES", 2)
    method = free(toy(), "exit", BetaMixture("published"))
    method.confidence, method.agree = [0.95, 0.9, 0.2], [True, True, False]
    for _ in range(4):
        method.generate(PROMPT, 3)
    assert method.updates == 2


def test_exit_ends_with_a_stop_token_and_leaves_the_stack():
    decoder = toy(deep_share=0.0)
    whole = free(decoder, "exit", -1.0).generate(PROMPT, 9)
    stop = whole.token_ids[4]
    ended = whole.token_ids.index(stop) + 1
    answer = free(decoder, "exit", -1.0).generate(PROMPT, 9, {stop})
    assert answer.token_ids == whole.token_ids[:ended]
    assert answer.deep_rows == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_no_mode_says_more_than_it_may(mode, max_tokens):
    answer = free(toy(), mode, -1.0).generate(PROMPT, max_tokens)
    assert len(answer.token_ids) == max_tokens


def test_rollback_of_everything_unlikely_is_verification():
    decoder = toy()
    method = free(decoder, "exit", 0.05, rollback=0.0)
    answer = method.generate(PROMPT, TOKENS)
    # Never to be surprised at all leaves no draft; the last ones no deep layer saw.
    seen = TOKENS - answer.kept[-1]
    assert answer.token_ids[:seen] == plain(decoder, PROMPT, seen)
    assert sum(answer.kept[:-1]) == 0


def test_without_rollback_every_draft_stands():
    answer = free(toy(), "exit", 0.05).generate(PROMPT, TOKENS)
    assert answer.kept == answer.drafted


@torch.no_grad()
def test_the_reference_runs_transformers_models_too(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapter = exit_head.ExitAdapter("mlp", 64, 8)
    torch.nn.init.normal_(adapter.up.weight, std=0.1)
    method = Free(TransformersLayers(model), 1, "verify", -1.0, adapter, cap=3)
    answer = method.generate(PROMPT, 16)
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    whole = model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert answer.token_ids == whole[0, len(PROMPT) :].tolist()
