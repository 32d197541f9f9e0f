import torch

from vllm_accel.cerberus.drafter import NO_ROOM, CerberusDrafter, StepReport
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import Always, EntropyThreshold, Never, Unlearning

HIDDEN, VOCAB = 16, 12


class CountingLMHead:
    def __init__(self):
        torch.manual_seed(0)
        self.matrix = torch.randn(VOCAB, HIDDEN)
        self.rows = 0

    def __call__(self, hidden):
        self.rows += hidden.shape[0]
        return hidden @ self.matrix.T


def make(gate, draft_tokens=3):
    lm_head = CountingLMHead()
    heads = CerberusHeads(draft_tokens=draft_tokens, blocks=2, hidden_size=HIDDEN)
    return CerberusDrafter(heads, lm_head, Unlearning(gate)), lm_head


def run(gate, rows, room, scale=1.0):
    drafter, lm_head = make(gate)
    hidden = torch.randn(max(rows) + 1, HIDDEN)
    logits = lm_head(hidden) * scale
    lm_head.rows = 0
    report = StepReport()
    ids = [str(i) for i in range(len(rows))]
    drafts = drafter.draft(ids, rows, room, hidden, logits, report)
    return drafts, logits, lm_head, report


def test_heads_of_zeros_repeat_the_targets_choice_at_the_last_accepted_row():
    drafts, logits, _, _ = run(Always(), rows=[2, 4], room=[9, 9])
    assert drafts == [[int(logits[2].argmax())] * 3, [int(logits[4].argmax())] * 3]


def test_a_draft_is_no_longer_than_its_room():
    drafts, _, _, report = run(Always(), rows=[0, 1, 2], room=[1, 0, 9])
    assert [len(draft) for draft in drafts] == [1, 0, 3]
    assert report.draft_lengths == {1: 1, 0: 1, 3: 1}
    assert report.gate["closed", NO_ROOM] == 1


def test_a_closed_gate_runs_no_head():
    drafts, _, lm_head, report = run(Never(), rows=[0, 1], room=[9, 9])
    assert drafts == [[], []]
    assert lm_head.rows == 0
    assert report.gate == {
        ("closed", "never"): 2,
        ("open", "never"): 0,
        ("closed", NO_ROOM): 0,
    }


def test_only_open_requests_run_heads():
    sharpness = torch.tensor([[0.1], [100.0], [0.1], [100.0]])
    drafts, _, lm_head, _ = run(
        EntropyThreshold(0.5), rows=[0, 1, 2, 3], room=[9] * 4, scale=sharpness
    )
    assert [len(draft) for draft in drafts] == [0, 3, 0, 3]
    assert lm_head.rows == 3 * 2


def test_a_request_still_in_prefill_is_not_a_decision():
    drafts, _, _, report = run(Always(), rows=[-1, 0], room=[9, 9])
    assert drafts[0] == []
    assert report.gate.total() == 1
    assert report.draft_lengths.total() == 1


def test_the_heads_run_for_whom_the_first_rank_says():
    heads = CerberusHeads(draft_tokens=3, blocks=2, hidden_size=HIDDEN)
    lm_head = CountingLMHead()
    drafter = CerberusDrafter(heads, lm_head, Unlearning(Never()), lambda decide: [1])
    hidden = torch.randn(2, HIDDEN)
    drafts = drafter.draft(
        ["a", "b"], [0, 1], [9, 9], hidden, lm_head(hidden), StepReport()
    )
    assert [len(draft) for draft in drafts] == [0, 3]
