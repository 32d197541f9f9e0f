"""The model's own continuations of pieces of text, through vLLM: what heads learn from."""

import json
import logging
import random
from pathlib import Path

import psutil
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from vllm_accel.looping import without_loop

logger = logging.getLogger("vllm.vllm_accel")

PROMPT_TOKENS = 96
MAX_TOKENS = 256
_BATCH = 256
_MEMORY, _FREE_MEMORY = 0.8, 0.5


def continue_rows(model: str, texts: list[list[int]], output: Path, rows: int) -> None:
    """Writes greedy continuations of windows of the texts; goes on after a stop.

    Args:
        model: a folder or a hub id.
        texts: token ids of each text; those of 96 tokens and more are used.
        output: JSON lines {"prompt_ids", "token_ids"}; loops are cut off.
        rows: lines the file shall have in the end; fewer if the texts are short.
    """
    done = _complete_lines(output)
    prompts = _prompts(texts)[:rows]
    if done >= len(prompts):
        return
    llm = LLM(
        model,
        max_model_len=PROMPT_TOKENS + MAX_TOKENS,
        max_num_seqs=128,
        gpu_memory_utilization=_memory_share(),
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, detokenize=False)
    total = len(prompts)
    with output.open("a") as out, tqdm(total=total, initial=done, unit="rows") as progress:
        for first in range(done, total, _BATCH):
            batch = prompts[first : first + _BATCH]
            inputs = [{"prompt_token_ids": prompt} for prompt in batch]
            answers = llm.generate(inputs, sampling, use_tqdm=False)
            for prompt, answer in zip(batch, answers, strict=True):
                said = without_loop(list(answer.outputs[0].token_ids))
                out.write(json.dumps({"prompt_ids": prompt, "token_ids": said}) + "\n")
            out.flush()
            progress.update(len(batch))


def _memory_share() -> float:
    """Of all memory, what vLLM may take.

    On CPU half of what is free: vLLM's default is refused as soon as something else runs,
    and whatever is started meanwhile needs some as well.
    """
    if not current_platform.is_cpu():
        return _MEMORY
    memory = psutil.virtual_memory()
    return _FREE_MEMORY * memory.available / memory.total


def _complete_lines(output: Path) -> int:
    """Whole lines of the file; a torn last line, of a kill or a full disk, is cut off."""
    if not output.is_file():
        return 0
    text = output.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        output.write_bytes(whole)
    return whole.count(b"\n")


def _prompts(texts: list[list[int]]) -> list[list[int]]:
    """Windows that share no token, in the same order on every call."""
    windows = [
        ids[first : first + PROMPT_TOKENS]
        for ids in texts
        for first in range(0, len(ids) - PROMPT_TOKENS + 1, PROMPT_TOKENS)
    ]
    random.Random(0).shuffle(windows)
    return windows
