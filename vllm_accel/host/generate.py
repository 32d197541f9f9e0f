"""The model's own continuations of pieces of text, through vLLM: what heads learn from."""

import json
import logging
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from vllm import LLM, SamplingParams

from vllm_accel.looping import without_loop

logger = logging.getLogger("vllm.vllm_accel")

PROMPT_TOKENS = 96
MAX_TOKENS = 256
_BATCH = 256


def continue_rows(model: str, texts: list[list[int]], output: Path, rows: int) -> None:
    """Writes greedy continuations of windows of the texts; goes on after a stop.

    Args:
        model: a folder or a hub id.
        texts: token ids of each text; those of 97 tokens and more are used.
        output: JSON lines {"prompt_ids", "token_ids"}; loops are cut off.
        rows: lines the file shall have in the end.
    """
    done = _complete_lines(output)
    if done >= rows:
        return
    llm = LLM(model, max_model_len=PROMPT_TOKENS + MAX_TOKENS, max_num_seqs=128)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, detokenize=False)
    source = islice(_prompts(texts, rows), done, None)
    with output.open("a") as out, tqdm(total=rows, initial=done, unit="rows") as progress:
        while batch := list(islice(source, _BATCH)):
            inputs = [{"prompt_token_ids": prompt} for prompt in batch]
            answers = llm.generate(inputs, sampling, use_tqdm=False)
            for prompt, answer in zip(batch, answers, strict=True):
                said = without_loop(list(answer.outputs[0].token_ids))
                out.write(json.dumps({"prompt_ids": prompt, "token_ids": said}) + "\n")
            out.flush()
            progress.update(len(batch))


def _complete_lines(output: Path) -> int:
    """Whole lines of the file; a torn last line, of a kill or a full disk, is cut off."""
    if not output.is_file():
        return 0
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        output.write_bytes(whole)
    return whole.count(b"\n")


def _prompts(texts: list[list[int]], rows: int) -> Iterator[list[int]]:
    """The same windows on every call, so that a run can go on where it stopped."""
    rng = random.Random(0)
    long_enough = [ids for ids in texts if len(ids) > PROMPT_TOKENS]
    for _ in range(rows if long_enough else 0):
        ids = rng.choice(long_enough)
        first = rng.randrange(len(ids) - PROMPT_TOKENS)
        yield ids[first : first + PROMPT_TOKENS]
