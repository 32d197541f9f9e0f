"""Whether the next step is scheduled before this one's output is in, and with drafts."""

from vllm_accel.speculate import StepReport

PATIENCE = 16
"""Steps in which the gate wanted no draft before steps are queued without room for any.

Room that stays empty costs slots and token budget, not time; a wish that finds none costs
two plain steps. Twice the steps between two looks of a closed `goodput` gate.
"""
BUDGET_SHARE = 1 / 4
"""Of a step's token budget, what room for drafts may take from prompts, at most."""
GRAMMAR_PATIENCE = 4
"""Steps without structured output before the engine runs ahead again."""


def room(draft_tokens: int, num_reqs: int, budget: int) -> int:
    """Draft tokens each request of the next step has room for.

    Args:
        draft_tokens: of the longest draft.
        num_reqs: requests that run.
        budget: tokens a step may have.
    """
    return min(draft_tokens, int(BUDGET_SHARE * budget) // max(1, num_reqs))


class RunAhead:
    """Runs ahead where no grammar needs the token before; makes room for drafts.

    Args:
        allowed: False waits for every step.
    """

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._quiet = PATIENCE
        self._since_grammar = GRAMMAR_PATIENCE

    @property
    def on(self) -> bool:
        """True: steps are queued one ahead."""
        return self._allowed and self._since_grammar >= GRAMMAR_PATIENCE

    @property
    def makes_room(self) -> bool:
        """True: a step queued ahead has room for drafts that are not known yet."""
        return self.on and self._quiet < PATIENCE

    def scheduled(self, *, grammar: bool) -> None:
        """Counts a step; `grammar`: some of its requests have structured output."""
        self._since_grammar = 0 if grammar else self._since_grammar + 1

    def note(self, report: StepReport) -> None:
        """Takes in what a finished step drafted, or would have."""
        if report.wanted:
            self._quiet = 0
        elif report.asked:
            self._quiet += 1
