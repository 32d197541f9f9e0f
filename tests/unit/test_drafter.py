import torch

from vllm_accel.cerberus.drafter import CerberusDrafter
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.gating.policy import Always, EntropyThreshold, Never, Unlearning
from vllm_accel.speculate import AHEAD, NO_ROOM, Decoding, StepReport

HIDDEN, VOCAB = 16, 12


class CountingLMHead:
    def __init__(self):
        torch.manual_seed(0)
        self.matrix = torch.randn(VOCAB, HIDDEN)
        self.rows = 0

    def __call__(self, hidden):
        self.rows += hidden.shape[0]
        return hidden @ self.matrix.T


def embed(token_ids):
    return torch.nn.functional.one_hot(token_ids, HIDDEN).float()


def make(gate, draft_tokens=3, reads_token=False):
    lm_head = CountingLMHead()
    heads = CerberusHeads(
        draft_tokens=draft_tokens, blocks=2, hidden_size=HIDDEN, reads_token=reads_token
    )
    drafter = CerberusDrafter(heads, embed, lm_head, Unlearning(gate))
    return drafter, lm_head, heads


def run(gate, rows, room, scale=1.0, may_draft=True):
    drafter, lm_head, _ = make(gate)
    hidden = torch.randn(max(rows) + 1, HIDDEN)
    logits = lm_head(hidden) * scale
    lm_head.rows = 0
    report = StepReport()
    ids = [str(i) for i in range(len(rows))]
    requests = Decoding(ids, rows, [0] * len(rows), room)
    drafts = drafter.draft(requests, hidden, logits, report, may_draft=may_draft)
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
        ("closed", AHEAD): 0,
        ("closed", NO_ROOM): 0,
    }


def test_a_step_that_must_not_draft_says_for_whom_it_would_have():
    drafts, _, lm_head, report = run(Always(), [0, 1, 2], [9, 0, 9], may_draft=False)
    assert drafts == [[], [], []]
    assert (lm_head.rows, report.drafted_for, report.wanted) == (0, 0, 2)
    assert report.gate["closed", AHEAD] == 2


def test_a_gate_that_wants_drafts_is_not_asked_again_until_it_can_have_them():
    class Once:
        reason = "once"
        asked = 0

        def admit(self, signals):
            self.asked += 1
            return [self.asked != 2] * len(signals)

    gate = Once()
    drafter, lm_head, _ = make(gate)
    hidden = torch.randn(1, HIDDEN)

    def step(may_draft):
        requests = Decoding(["a"], [0], [0], [9])
        report = StepReport()
        logits = lm_head(hidden)
        drafter.draft(requests, hidden, logits, report, may_draft=may_draft)
        return report.wanted, gate.asked

    assert [step(False), step(False), step(True), step(True)] == [
        (1, 1),
        (1, 1),
        (0, 2),
        (1, 3),
    ]


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


def test_who_drafts_and_what_is_as_the_first_rank_says():
    said = iter(([1], [[4, 5]]))
    heads = CerberusHeads(draft_tokens=3, blocks=2, hidden_size=HIDDEN)
    lm_head = CountingLMHead()
    drafter = CerberusDrafter(
        heads, embed, lm_head, Unlearning(Never()), share=lambda decide: next(said)
    )
    hidden = torch.randn(2, HIDDEN)
    requests = Decoding(["a", "b"], [0, 1], [0, 0], [9, 9])
    drafts = drafter.draft(requests, hidden, lm_head(hidden), StepReport())
    assert drafts == [[], [4, 5]]


def test_heads_that_read_tokens_are_given_the_one_chosen():
    drafter, lm_head, heads = make(Always(), reads_token=True)
    says_1_after_0_and_3_after_6 = torch.zeros(HIDDEN, HIDDEN)
    says_1_after_0_and_3_after_6[:, [0, 6]] = lm_head.matrix[[1, 3]].T
    heads.token_weight.data = says_1_after_0_and_3_after_6
    hidden = torch.zeros(2, HIDDEN)
    requests = Decoding(["a", "b"], [0, 1], [0, 6], [9, 9])
    drafts = drafter.draft(requests, hidden, lm_head(hidden), StepReport())
    assert drafts == [[1] * 3, [3] * 3]
