"""Which signal tells best that no draft token will be accepted?

On greedy continuations of held-out code: the area under the ROC curve of each signal for
"the first draft token is rejected"; 0.5 is chance.

    python gate_study.py CORPUS MODEL --rows 200
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from retrieval import held_out_ids
from scipy.stats import mannwhitneyu
from tokenizers import Tokenizer
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from vllm_accel.cerberus import checkpoint
from vllm_accel.gating.signals import confidence, feature_entropy, margin
from vllm_accel.training import evaluate
from vllm_accel.training.model import FrozenBaseWithHeads

ROW = 256


def auc(signal: torch.Tensor, rejected: torch.Tensor) -> float:
    """P(signal of a rejected one > of an accepted one), ties counted half."""
    high, low = signal[rejected].numpy(), signal[~rejected].numpy()
    return float(mannwhitneyu(high, low).statistic / (len(high) * len(low)))


def signals(model: FrozenBaseWithHeads, seen) -> dict[str, torch.Tensor]:
    """Each signal oriented so that more of it should mean rejection: [tokens]."""
    states = seen.hidden_states.to(torch.bfloat16)
    weight = model.base.lm_head.weight
    logits = linear(states, weight)
    rows = model.heads.draftable_rows(weight)
    after = model.base.get_input_embeddings()(seen.token_ids[:, 0])
    drafts = model.heads.logits(model.heads(states, after), partial(linear, weight=rows))
    sure = confidence(drafts, drafts.max(dim=-1).values)
    return {
        "entropy over the vocabulary": seen.entropy,
        "entropy over the features": feature_entropy(states),
        "1 - margin": 1 - margin(logits),
        "1 - confidence of the first head": 1 - sure[0],
        "entropy of the first head": evaluate.entropy(drafts[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("model", type=Path)
    parser.add_argument("--heads", type=Path, help="default: MODEL/cerberus")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    _, heads = checkpoint.load(args.heads or args.model / "cerberus")
    model = FrozenBaseWithHeads(base, heads.to(torch.bfloat16))
    ids = held_out_ids(args.corpus, tokenizer, "code").tolist()
    step = max(ROW, len(ids) // args.rows)
    windows = [ids[i : i + ROW] for i in range(0, len(ids) - ROW, step)]
    rows = [{"input_ids": window, "labels": window} for window in windows]
    seen = evaluate.observe(model, evaluate.continued(model, rows))
    rejected = seen.accepted == 0
    found = {k: round(auc(s, rejected), 3) for k, s in signals(model, seen).items()}
    facts = {"tokens": len(rejected), "rejected": round(float(rejected.float().mean()), 3)}
    print(json.dumps(facts | {"auc": found}, indent=2))


if __name__ == "__main__":
    main()
