"""LazyLLM by tokens or by pages: how many questions are right, by the unit left out.

    python unit_study.py MODEL --length 4096 --questions 100 --settings '[{"spread": 0}]'

The paper leaves out tokens; vLLM's cache is made of pages. In plain torch, float32, the
prefill as lazyllm does it (asked of the layer to come, by the last 8 tokens; nothing
comes back), at equal shares kept. The layers before the first pruning point run once.
"""

import argparse
import json
import statistics

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_accel.bench import prefill, tasks
from vllm_accel.lazyllm.config import LazyConfig
from vllm_accel.lazyllm.importance import attention_paid, most_important, scorer
from vllm_accel.lazyllm.schedule import Schedule


class Way:
    """How a prompt is pruned."""

    def __init__(self, name: str, model, unit: int, settings: dict) -> None:
        config = LazyConfig(granularity="page", revive="off", **settings)
        layers = model.config.num_hidden_layers
        self.name = name
        self.plan = Schedule.of(config, num_layers=layers, block_size=unit)
        self.score = scorer(config.choose, config.pooling, config.spread)


class Pruned:
    """A prompt on its way through the layers, and the tokens after it."""

    def __init__(self, model, hidden) -> None:
        self.model = model.model
        self.lm_head = model.lm_head
        self.hidden = hidden  # [1, tokens, hidden_size]
        self.positions = torch.arange(hidden.shape[1])
        self.keys: list = []
        self.values: list = []

    def copy(self) -> "Pruned":
        other = object.__new__(Pruned)
        other.__dict__ |= self.__dict__
        other.keys, other.values = list(self.keys), list(self.values)
        return other

    def project(self, layer):
        """Query, key, value [1, heads, tokens, head_size] of a layer, rotated."""
        attention = layer.self_attn
        normed = layer.input_layernorm(self.hidden)
        query, key, value = (
            part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.model.rotary_emb(self.hidden, self.positions[None])
        return *apply_rotary_pos_emb(query, key, cos, sin), value

    def run(self, number: int, *, decodes: bool = False) -> None:
        layer = self.model.layers[number]
        query, key, value = self.project(layer)
        if decodes:
            key = self.keys[number] = torch.cat([self.keys[number], key], dim=2)
            value = self.values[number] = torch.cat([self.values[number], value], dim=2)
        else:
            self.keys.append(key)
            self.values.append(value)
        seen = scaled_dot_product_attention(
            query, key, value, is_causal=not decodes, enable_gqa=True
        )
        attended = seen.transpose(1, 2).flatten(-2)
        self.hidden = self.hidden + layer.self_attn.o_proj(attended)
        self.hidden = self.hidden + layer.mlp(layer.post_attention_layernorm(self.hidden))

    def leave_out(self, number: int, way: Way, span: int, num_tokens: int) -> None:
        """Keeps what the last tokens look at in layer `number`, not run yet."""
        plan = way.plan
        query, key, _ = self.project(self.model.layers[number])
        rows, size = query[0].transpose(0, 1)[-plan.observe :], plan.unit
        paid = attention_paid(rows, key[0].transpose(0, 1), rows.shape[-1] ** -0.5)
        units, within = np.unique(self.positions.numpy() // size, return_inverse=True)
        importance = way.score(paid, size)
        always = plan.always_kept(num_tokens, 0, num_tokens)[units]
        count = plan.num_kept(span, 0, num_tokens, int(always.sum()))
        kept = torch.from_numpy(most_important(importance, always, count)[within])
        self.hidden, self.positions = self.hidden[:, kept], self.positions[kept]

    def answer(self, num_tokens: int, most: int) -> list[int]:
        """Greedy tokens, one by one."""
        said: list[int] = []
        for position in range(num_tokens, num_tokens + most):
            token = self.lm_head(self.model.norm(self.hidden[:, -1])).argmax()
            said.append(int(token))
            self.hidden = self.model.embed_tokens(token[None, None])
            self.positions = torch.tensor([position])
            for number in range(len(self.model.layers)):
                self.run(number, decodes=True)
        return said


def ways(model, units: list[int], settings: list[dict]) -> list[Way]:
    """All units with all settings; the whole prompt first."""
    made = [Way("all", model, units[0], {"keep": 1.0})]
    for unit in units:
        made += [Way(f"{unit} {one or ''}", model, unit, one) for one in settings]
    return made


def finish(prompt: Pruned, way: Way, num_tokens: int) -> Pruned:
    """Runs the spans after the first."""
    for k, span in enumerate(way.plan.spans[1:], 1):
        if way.plan.keep[k] < 1:
            prompt.leave_out(span.first, way, k, num_tokens)
        for number in range(span.first, span.stop):
            prompt.run(number)
    return prompt


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--units", type=json.loads, default=[1, 16, 32, 64, 128])
    parser.add_argument("--settings", type=json.loads, default=[{}], help="of lazyllm")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    asked = ways(model, options.units, options.settings)
    right: dict[str, list[bool]] = {way.name: [] for way in asked}
    for question in tqdm(tasks.made(tokenizer, options.length, options.questions)):
        ids = torch.tensor([question.token_ids])
        begun, num_tokens = Pruned(model, model.model.embed_tokens(ids)), ids.shape[1]
        for number in range(asked[0].plan.spans[0].stop):
            begun.run(number)
        for way in asked:
            prompt = finish(begun.copy(), way, num_tokens)
            said = prompt.answer(num_tokens, question.max_tokens)
            right[way.name].append(tasks.is_right(question, tokenizer.decode(said)))
    for name, ours in right.items():
        lost, won = prefill.lost_and_won(ours, right["all"])
        p = prefill.mcnemar_p(lost, won)
        print(f"{name:24} {statistics.fmean(ours):.3f}  lost {lost} won {won}  p {p:.3f}")


if __name__ == "__main__":
    main()
