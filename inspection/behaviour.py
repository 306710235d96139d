"""What a model does on this machine: the logits of a fixed prompt, the perplexity of a fixed text, speed and memory.

They are measured, not claimed, and small: a later copy, another precision or another container can be held against the
logits without the first one being there.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

import console
from chat import Chat
from inference.likelihood import Scorer
from model import KVCache, Qwen3

PROMPT = "The quick brown fox jumps over the lazy dog. One, two, three, four,"
SHOWN = 32  # of the largest logits
TOKENS = 16  # generated to measure the speed
PASSAGE = Path(__file__).resolve().parent.parent / "data" / "passage.txt"
MOST = 2 << 30  # bytes of weights that are run without --deep
CONTEXT = 512


def measure(path: Path) -> dict[str, Any]:
    """Runs the model once. ValueError, in one line, for one that cannot be loaded."""
    began = time.monotonic()
    model = Qwen3.from_pretrained(path)
    loaded = time.monotonic() - began
    rows = model.config.vocab_size
    try:
        chat = Chat.from_pretrained(path)
        ids, passage = chat.encode(PROMPT), chat.encode(PASSAGE.read_text("utf-8"))
    except ValueError:
        ids, passage = [index % rows for index in range(16)], []
    ids = [id for id in ids if id < rows][: model.config.max_position_embeddings]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("its logits are not finite")
        values, top = logits.topk(min(SHOWN, rows))
        result = {
            "prompt": PROMPT,
            "prompt_ids": ids,
            "top_ids": top.tolist(),
            "top_logits": [round(value, 5) for value in values.tolist()],
            "logits_mean": round(logits.mean().item(), 6),
            "logits_std": round(logits.std().item(), 6),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "load_seconds": round(loaded, 3),
        }
        bits = _bits(model, passage) if len(passage) > 1 else None
        if bits is not None:
            result |= {
                "passage": PASSAGE.name,
                "passage_tokens": len(passage),
                "perplexity": round(2**bits, 4) if bits < 100 else None,
            }
        cache = KVCache(model.config, 1, len(ids) + TOKENS + 1, device="cpu", dtype=next(model.parameters()).dtype)
        token = model(torch.tensor([ids]), cache=cache)[:, -1:].argmax(-1)
        began = time.monotonic()
        for _ in range(TOKENS):
            token = model(token, cache=cache)[:, -1:].argmax(-1)
        result["tokens_per_second"] = round(TOKENS / (time.monotonic() - began), 2)
    result["peak_memory_bytes"] = console.peak_bytes()
    result["threads"] = torch.get_num_threads()
    return result


def _bits(model: Qwen3, ids: list[int]) -> float:
    """The mean of -log2 p over the tokens of a text but the first, in chunks of the context."""
    scorer, found = Scorer(model), []
    width = min(CONTEXT, model.config.max_position_embeddings)
    for start in range(0, len(ids) - 1, width):
        found += scorer.logprobs(ids[start : start + 1], ids[start + 1 : start + width + 1])
    return -sum(found) / len(found) / math.log(2)


def difference(before: dict[str, Any], now: dict[str, Any]) -> float | None:
    """The largest difference of the logits that both runs show; None where they were not of the same prompt."""
    if before.get("prompt_ids") != now.get("prompt_ids"):
        return None
    ours = dict(zip(now["top_ids"], now["top_logits"], strict=False))
    both = [
        abs(ours[id] - value)
        for id, value in zip(before.get("top_ids", []), before.get("top_logits", []), strict=False)
        if id in ours
    ]
    return max(both, default=None)
