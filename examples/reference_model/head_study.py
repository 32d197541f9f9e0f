"""Heads of several shapes at an equal budget: how often are their drafts accepted?

The base's hidden states of the continuations are computed once; each shape then sees the
same tokens in the same order. Accepted drafts a step are measured on continuations of
held-out code.

    python head_study.py CORPUS MODEL continuations.jsonl
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from retrieval import held_out_ids
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM

from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.training import data, evaluate
from vllm_accel.training.cross_entropy import frozen_linear_cross_entropy
from vllm_accel.training.model import HEAD_WEIGHT_DECAY, FrozenBaseWithHeads, targets
from vllm_accel.training.precision import fast_dtype

SHAPES = {
    "J=1 (Medusa)": {"blocks": 1, "cross_links": False},
    "J=1, own LM heads": {"blocks": 1, "cross_links": False, "own_lm_heads": True},
    "J=2, no links": {"blocks": 2, "cross_links": False},
    "J=2, links": {"blocks": 2},
    "J=2, links, token": {"blocks": 2, "reads_token": True},
    "J=3, links": {"blocks": 3},
}
BATCH = 1024
RATE = 2e-3
ROW = 256


@torch.no_grad()
def states_and_targets(model: FrozenBaseWithHeads, rows: list[data.Row], heads: int):
    """Of all tokens with every target: states, embeddings after, targets by head.

    Two times [tokens, hidden_size], and [heads, tokens].
    """
    states, after, wanted = [], [], []
    for row in rows:
        batch = data.collate([row])
        asked = torch.stack([targets(batch["labels"], h)[0] for h in range(heads)])
        kept = (asked != data.IGNORED).all(dim=0)
        states.append(model.hidden_states(batch["input_ids"])[0, kept])
        after.append(model.next_tokens(batch["input_ids"])[0, kept])
        wanted.append(asked[:, kept])
    return torch.cat(states), torch.cat(after), torch.cat(wanted, dim=1)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)


def loss_of(heads: CerberusHeads, states, after, wanted, weight) -> torch.Tensor:
    total = torch.zeros(())
    with autocast():
        said = heads(states, after)
    for i, (own, target) in enumerate(zip(said, wanted, strict=True)):
        if heads.lm_heads is None:
            loss = frozen_linear_cross_entropy(own, weight, target)
        else:
            with autocast():
                logits = linear(own, heads.lm_heads[i])
            loss = cross_entropy(logits.float(), target)
        total = total + HEAD_WEIGHT_DECAY**i * loss
    return total


def train(heads: CerberusHeads, states, after, wanted, weight) -> None:
    optimizer = torch.optim.AdamW(heads.parameters(), lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    batches = order.split(BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, len(batches))
    for picked in batches:
        seen = states[picked], after[picked], wanted[:, picked]
        loss_of(heads, *seen, weight).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def accepted_by_drafts(heads: CerberusHeads, states, after, wanted, weight) -> list[float]:
    """Accepted drafts a step when the first K heads draft, for each K."""
    heads.to(weight.dtype)
    run = partial(linear, weight=weight)
    drafts = torch.cat(
        [
            heads.logits(heads(s, e), run).argmax(dim=-1)
            for s, e in zip(states.split(2048), after.split(2048), strict=True)
        ],
        dim=1,
    )
    alive = drafts.eq(wanted).long().cumprod(dim=0).float().mean(dim=1)
    return [round(float(x), 3) for x in alive.cumsum(dim=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="what corpus.py wrote")
    parser.add_argument("model", type=Path)
    parser.add_argument("continuations", type=Path)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--draft-tokens", type=int, default=6)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=fast_dtype())
    none = CerberusHeads(draft_tokens=1, blocks=1, hidden_size=base.config.hidden_size)
    model, count = FrozenBaseWithHeads(base, none), args.draft_tokens
    rows = data.read_rows([args.continuations], None, 512)
    states, after, wanted = states_and_targets(model, rows, count)
    n = args.tokens
    seen = states[:n].clone(), after[:n].clone(), wanted[:, :n].clone()
    ids = held_out_ids(args.corpus, tokenizer, "code").tolist()
    windows = [ids[i : i + ROW] for i in range(0, len(ids) - ROW, len(ids) // 150)]
    texts = [{"input_ids": window, "labels": window} for window in windows]
    unseen = states_and_targets(model, evaluate.continued(model, texts), count)
    weight = base.lm_head.weight.detach()
    print(f"{len(seen[0])} training tokens, {len(unseen[0])} held out")
    for name, shape in SHAPES.items():
        heads = CerberusHeads(
            draft_tokens=count,
            hidden_size=base.config.hidden_size,
            vocab_size=base.config.vocab_size,
            **shape,
        )
        if heads.lm_heads is not None:
            heads.lm_heads.data[:] = weight.float()
        began = time.monotonic()
        train(heads, *seen, weight)
        accepted = accepted_by_drafts(heads, *unseen, weight)
        size = sum(p.numel() for p in heads.parameters()) / 1e6
        facts = {"shape": name, "million_weights": round(size, 2), "accepted": accepted}
        print(json.dumps(facts | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
