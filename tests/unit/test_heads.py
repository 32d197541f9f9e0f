import pytest
import torch

from vllm_accel.cerberus.heads import CerberusHeads

HIDDEN = 32


def make(draft_tokens=4, blocks=2, cross_links=True, noise=0.2, **more):
    torch.manual_seed(0)
    heads = CerberusHeads(
        draft_tokens=draft_tokens,
        blocks=blocks,
        hidden_size=HIDDEN,
        cross_links=cross_links,
        **more,
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=noise)
    return heads


def one_by_one(heads, hidden):
    """The equation of papers.md 1.2, head by head: the reference for the batched form."""
    silu = torch.nn.functional.silu
    states = [
        hidden + silu(hidden @ w.T + b)
        for w, b in zip(heads.weights[0], heads.biases[0], strict=True)
    ]
    for weights, biases in zip(heads.weights[1:], heads.biases[1:], strict=True):
        before = [hidden, *states[:-1]]
        read = [torch.cat(pair, dim=-1) for pair in zip(states, before, strict=True)]
        if not heads.cross_links:
            read = states
        states = [
            x + silu(r @ w.T + b)
            for x, r, w, b in zip(states, read, weights, biases, strict=True)
        ]
    return torch.stack(states)


@pytest.mark.parametrize("cross_links", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_batched_form_is_the_equation(blocks, cross_links):
    heads = make(blocks=blocks, cross_links=cross_links)
    hidden = torch.randn(5, HIDDEN)
    torch.testing.assert_close(heads(hidden), one_by_one(heads, hidden))


def test_zero_weights_give_the_targets_own_state():
    hidden = torch.randn(5, HIDDEN)
    states = make(noise=0.0)(hidden)
    assert torch.equal(states, hidden.expand(4, -1, -1))


def test_the_next_token_is_read_at_the_size_of_a_hidden_state():
    heads = make(reads_token=True)
    hidden, token = torch.randn(2, 5, HIDDEN)
    unit = token / token.pow(2).mean(dim=-1, keepdim=True).sqrt()
    expected = one_by_one(heads, hidden + unit @ heads.token_weight.T)
    torch.testing.assert_close(heads(hidden, token), expected)
    torch.testing.assert_close(heads(hidden, 0.02 * token), expected)


def test_a_head_reads_the_one_before_it_and_no_later_one():
    hidden = torch.randn(3, HIDDEN)
    heads = make()
    before = heads(hidden)
    heads.weights[0].data[1] += 1.0
    changed = (heads(hidden) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, True, False]


def test_without_cross_links_heads_are_independent():
    hidden = torch.randn(3, HIDDEN)
    heads = make(cross_links=False)
    before = heads(hidden)
    heads.weights[0].data[1] += 1.0
    changed = (heads(hidden) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


def test_keeping_the_first_heads_keeps_their_answers():
    hidden = torch.randn(3, HIDDEN)
    heads = make(reads_token=True)
    before = heads(hidden, hidden)
    heads.keep_first(2)
    heads.lay_out_for_inference()
    torch.testing.assert_close(heads(hidden, hidden), before[:2])


def test_a_limited_vocabulary_drafts_the_best_of_its_tokens():
    heads = make()
    lm_head, hidden = torch.randn(50, HIDDEN), torch.randn(6, HIDDEN)
    everything = heads.logits(heads(hidden), lambda states: states @ lm_head.T)
    heads.limit_vocabulary(torch.arange(10, 30))
    limited = heads.logits(heads(hidden), lambda states: states @ lm_head[10:30].T)
    torch.testing.assert_close(limited, everything[..., 10:30])
    best = heads.token_ids(limited.argmax(dim=-1))
    assert torch.equal(best, 10 + everything[..., 10:30].argmax(dim=-1))


def test_lm_heads_of_their_own_are_used_and_limited():
    heads = CerberusHeads(
        draft_tokens=2, blocks=1, hidden_size=HIDDEN, vocab_size=20, own_lm_heads=True
    )
    torch.nn.init.normal_(heads.lm_heads)
    hidden = torch.randn(3, HIDDEN)
    said = heads.logits(heads(hidden), lm_head=None)
    torch.testing.assert_close(said[1], heads(hidden)[1] @ heads.lm_heads[1].T)
    heads.limit_vocabulary(torch.tensor([3, 7]))
    torch.testing.assert_close(heads.logits(heads(hidden), lm_head=None), said[..., [3, 7]])
