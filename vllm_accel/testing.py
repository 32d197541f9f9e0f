"""Small real models, heads, exits and gates to try things with: public, not mocks.

`write_tiny_model`, `write_untrained_heads` and `write_untrained_exit` give folders like
any others.
The gates are for `"gate": "vllm_accel.testing:RandomGate"`.
"""

import dataclasses
import json
import os
import random
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_accel.cerberus import checkpoint
from vllm_accel.cerberus.heads import CerberusHeads
from vllm_accel.free import checkpoint as exits
from vllm_accel.free.exit_head import ExitAdapter, ExitSignals
from vllm_accel.free.gates import LearntThreshold, Threshold
from vllm_accel.free.quality import ExitQuality
from vllm_accel.free.stack import Seen
from vllm_accel.gating.beta_mixture import INITIAL_THRESHOLD
from vllm_accel.gating.cost import StepShape
from vllm_accel.gating.goodput import Goodput
from vllm_accel.gating.signals import Signals
from vllm_accel.on_disk import base_model

_DRAFT_TOKENS = 8


class RandomGate:
    """Open by the toss of a coin, the same one on every run."""

    reason = "random"

    def __init__(self) -> None:
        self._random = random.Random(0)

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True with probability one half."""
        return [self._random.random() < 0.5 for _ in range(len(signals))]


class CoinGate:
    """Open by the toss of a coin, another one in every process."""

    reason = "coin"

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] True with probability one half."""
        return [random.SystemRandom().random() < 0.5 for _ in range(len(signals))]


class StretchGate:
    """Open for some steps, closed for some: room for drafts comes and goes."""

    reason = "stretch"
    _LENGTH = 8

    def __init__(self) -> None:
        self._asked = 0

    def admit(self, signals: Signals) -> list[bool]:
        """[num_reqs] all True or all False."""
        self._asked += 1
        return [self._asked // self._LENGTH % 2 == 1] * len(signals)


class RandomExitGate(Threshold):
    """For free: opens, exits and goes on by the toss of a coin, the same on every run."""

    def __init__(self) -> None:
        super().__init__(0.0, "random")
        self._random = random.Random(0)

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """[num_reqs] True three times out of four."""
        return [self._random.random() < 0.75 for _ in req_ids]

    def exits(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] True three times out of four."""
        return [self._random.random() < 0.75 for _ in range(len(said))]

    def goes_on(self, req_ids: Sequence[str]) -> bool:
        """True seven times out of eight."""
        return self._random.random() < 0.875


class OpenQuality(ExitQuality):
    """For free: the gate `quality`, open whatever it costs, so that no clock decides.

    Nothing is drafted that is not final.
    """

    def __init__(self) -> None:
        super().__init__(_DRAFT_TOKENS, INITIAL_THRESHOLD)

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """[num_reqs] True."""
        return [True] * len(req_ids)

    def exits(self, said: ExitSignals) -> list[bool]:
        """[num_reqs] True above the threshold."""
        super().exits(said)
        return self.final(said)

    def goes_on(self, req_ids: Sequence[str]) -> bool:
        """True."""
        return True


class RecordingQuality(OpenQuality):
    """For free: `OpenQuality` that writes what it learns to `ACCEL_RECORD`.

    JSON lines, one a stack: {"drafted", "agree", "quality", "beta_mixture"}, the latter
    two thresholds of the confidence: its own, and FREE's from the same evidence.
    """

    def __init__(self) -> None:
        super().__init__()
        self._published = LearntThreshold()
        self._record = _Record()

    def admit(self, req_ids: Sequence[str], num_decoding: int) -> list[bool]:
        """See `ExitGate.admit`."""
        self._published.admit(req_ids, num_decoding)
        return super().admit(req_ids, num_decoding)

    def learn(self, seen: Seen) -> None:
        """See `ExitGate.learn`."""
        super().learn(seen)
        self._published.learn(seen)
        self._record.write(
            {
                "drafted": seen.drafted,
                "agree": seen.agree,
                "quality": self.threshold_of(seen.req_id),
                "beta_mixture": self._published.threshold,
            }
        )

    def keep_only(self, req_ids: Container[str]) -> None:
        """See `ExitGate.keep_only`."""
        super().keep_only(req_ids)
        self._published.keep_only(req_ids)


class RecordingGoodput(Goodput):
    """The gate `goodput` that writes what it is told and decides to `ACCEL_RECORD`.

    JSON lines: {"decided": requests, "opened": how many}, {"verified", "accepted"} a
    verdict, {"decode_rows", "requests", "prefill_tokens", "drafted_for", "seconds",
    "predicted"} a measured step.
    """

    def __init__(self, draft_tokens: int) -> None:
        super().__init__(draft_tokens)
        self._record = _Record()

    def admit(self, signals: Signals) -> list[bool]:
        """See `Goodput.admit`."""
        admitted = super().admit(signals)
        self._record.write({"decided": len(admitted), "opened": sum(admitted)})
        return admitted

    def learn(self, req_id: str, verified: int, accepted: int) -> None:
        """See `Goodput.learn`."""
        super().learn(req_id, verified, accepted)
        self._record.write({"verified": verified, "accepted": accepted})

    def observe(self, shape: StepShape, seconds: float) -> None:
        """See `Goodput.observe`."""
        predicted = float(self.cost.seconds(shape)[0])
        super().observe(shape, seconds)
        times = {"seconds": seconds, "predicted": predicted}
        self._record.write(dataclasses.asdict(shape) | times)


class _Record:
    """The file `ACCEL_RECORD`, JSON line by JSON line."""

    def __init__(self) -> None:
        path = Path(os.environ["ACCEL_RECORD"])
        self._out = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        """A line, at once."""
        self._out.write(json.dumps(line) + "\n")


def write_tiny_model(
    folder: Path,
    *,
    vocab_size: int = 64,
    hidden_size: int = 64,
    layers: int = 2,
    scale: float = 0.3,
    seed: int = 0,
) -> Path:
    """A Llama with random weights large enough to be worth testing, no tokenizer.

    Args:
        folder: made if missing.
        vocab_size: at least 2; token 0 is never special.
        hidden_size: a multiple of 64; heads are 32 wide.
        layers: decoder layers.
        scale: standard deviation of every matrix. vLLM's own dummy weights are about
            1e-3, which makes any two runs agree.
        seed: of the weights.

    Returns:
        The folder.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        initializer_range=scale,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_untrained_heads(
    folder: Path,
    base: Path,
    *,
    draft_tokens: int = 4,
    blocks: int = 2,
    noise: float = 0.0,
    reads_token: bool = False,
    **config: Any,
) -> Path:
    """Heads that fit a model but learnt nothing: they draft its next token again.

    Args:
        folder: made if missing.
        base: folder of the model.
        draft_tokens: number of heads.
        blocks: residual blocks per head.
        noise: standard deviation of the weights; 0 leaves them at zero.
        reads_token: see `CerberusHeads`.
        config: values of `checkpoint.HeadsConfig` to write instead of the true ones.

    Returns:
        The folder.
    """
    lm_head = base_model.lm_head_weight(base).float()
    vocab_size, hidden_size = lm_head.shape
    torch.manual_seed(0)
    heads = CerberusHeads(
        draft_tokens=draft_tokens,
        blocks=blocks,
        hidden_size=hidden_size,
        reads_token=reads_token,
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=noise)
    states = torch.randn(16, hidden_size).bfloat16().float()
    said = (states @ lm_head.T).argmax(dim=-1)
    values: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "draft_tokens": draft_tokens,
        "blocks": blocks,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "cross_links": True,
        "reads_token": reads_token,
        "own_lm_heads": False,
        "draft_vocab_size": vocab_size,
        "base_name": base.name,
        "base_fingerprint": base_model.fingerprint(base),
        "entropy_threshold": 2.0,
        "accepted_per_step": 0.0,
    }
    test = checkpoint.SelfTest(states, said[:, None].repeat(1, 1 + draft_tokens))
    checkpoint.save(folder, checkpoint.HeadsConfig(**(values | config)), heads, test)
    return folder


def write_untrained_exit(
    folder: Path,
    base: Path,
    *,
    exit_layer: int = 1,
    adapter: str = "mlp",
    width: int = 16,
    noise: float = 0.0,
    **config: Any,
) -> Path:
    """An exit that fits a model but learnt nothing: its states go to the norm as they are.

    Args:
        folder: made if missing.
        base: folder of the model.
        exit_layer: layers before the exit.
        adapter: one of `exit_head.ADAPTERS`.
        width: of the adapter.
        noise: standard deviation of the weights; 0 leaves the adapter an identity.
        config: values of `checkpoint.ExitConfig` to write instead of the true ones.

    Returns:
        The folder.
    """
    lm_head = base_model.lm_head_weight(base).float()
    vocab_size, hidden_size = lm_head.shape
    torch.manual_seed(0)
    width = 0 if adapter == "none" else width
    weights = ExitAdapter(adapter, hidden_size, width)
    for parameter in weights.parameters() if noise else ():
        torch.nn.init.normal_(parameter, std=noise)
    states, normed = torch.randn(2, 16, hidden_size).bfloat16().float()
    said = (normed @ lm_head.T).argmax(dim=-1)
    values: dict[str, Any] = {
        "format": exits.FORMAT,
        "exit_layer": exit_layer,
        "num_layers": json.loads((base / "config.json").read_text())["num_hidden_layers"],
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "adapter": adapter,
        "adapter_width": width,
        "base_name": base.name,
        "base_fingerprint": base_model.fingerprint(base),
        "threshold": 0.9,
        "agreement": 1.0,
    }
    test = exits.SelfTest.of(weights, states, normed, torch.stack([said, said], dim=1))
    exits.save(folder, exits.ExitConfig(**(values | config)), weights, test)
    return folder
