"""Everything that a lens page shows of one prompt and its reply, as one JSON object; `verify` computes it again.

Numbers are rounded once, here, so that the page, `--json` and a verification speak of the same digits.
"""

import base64
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from chat import Chat
from inference.decode import check_prompt
from inference.params import SamplingParams
from inference.sampling import Said, distribution
from inspection.lens.attribution import attribution
from inspection.lens.spans import prompt_spans, reply_spans, starts
from inspection.lens.trace import trace
from model import Qwen3

SCHEMA = "nanoqwen/lens/1"
SHOWN = 8  # likeliest tokens beside each token of the reply
MOST_TOKENS = 2048
MOST_ATTENTION = 1_200_000  # bytes of the packed attention, before compression

Progress = Callable[[str, int, int], None]


def numbers(
    model: Qwen3,
    chat: Chat,
    ids: Sequence[int],
    begin: int,
    contents: Sequence[str],
    params: SamplingParams,
    single: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Of the text `ids`, whose reply begins at `begin`. `contents`: the messages' texts; `single`: each token a span.

    Raises ValueError for a text that the model's context, or a page, does not hold.
    """
    check_prompt(model, ids)
    if not 1 <= begin < len(ids):
        raise ValueError("there is no reply to look at: the model answered with nothing, or --answer is empty")
    if len(ids) > MOST_TOKENS:
        raise ValueError(f"{len(ids):,} tokens; a page shows at most {MOST_TOKENS:,}: shorten it, or --max-new-tokens")
    rows = range(begin - 1, len(ids) - 1)  # the positions that predict the reply
    spans = [*prompt_spans(chat, ids[:begin], contents, single), *reply_spans(chat, ids, begin, single)]
    layers = model.config.num_hidden_layers
    seen = trace(model, ids, rows, lambda done: progress("layers", done, layers))
    return {
        "schema": SCHEMA,
        "tokens": _tokens(chat, ids, begin, seen),
        "reply": begin,
        "alternatives": _alternatives(chat, ids, begin, seen.logits, params),
        "spans": [span._asdict() for span in spans],
        "attribution": _rounded(
            attribution(model, ids, begin, spans, lambda done, total: progress("attribution", done, total))
        ),
        "layers": [
            {"layer": number, "tokens": [{"id": i, "p": digits(p)} for i, p in zip(*layer, strict=True)]}
            for number, layer in enumerate(seen.layers)
        ],
        "names": {str(i): chat.decode([i]) for layer, _ in seen.layers for i in layer},
        "residual_norms": [[digits(value) for value in norms] for norms in seen.residual_norms],
        "attention": pack_attention(seen.attention),
    }


def digits(value: float | None) -> float | None:
    """Six significant digits: below what float32 keeps, above what anybody reads."""
    return None if value is None else float(f"{value:.6g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return digits(value) if isinstance(value, float) else value


def _tokens(chat: Chat, ids: Sequence[int], begin: int, seen: Any) -> list[dict[str, Any]]:
    text, places = starts(chat, ids)
    thinking, found = chat.opens_thinking(ids[:begin]), []
    for place, token in enumerate(ids):
        if place >= begin and token == chat.think_start_id:
            thinking = True
        end = places[place + 1] if place + 1 < len(places) else len(text)
        found.append(
            {
                "id": token,
                "text": text[places[place] : end],
                "bytes": chat.token_bytes(token).hex(),
                "special": token in chat.special_ids or token in (chat.think_start_id, chat.think_end_id),
                "bits": digits(seen.bits[place]),
                "entropy_bits": digits(seen.entropy_bits[place]),
                "rank": seen.ranks[place],
                "role": "prompt" if place < begin else "thinking" if thinking else "answer",
            }
        )
        if token == chat.think_end_id:
            thinking = False
    return found


def _alternatives(
    chat: Chat, ids: Sequence[int], begin: int, logits: torch.Tensor, params: SamplingParams
) -> list[list[dict[str, Any]]]:
    """For each token of the reply the likeliest ones: `p` under the model, `sampled` after penalties, temperature and
    filters, as sampling draws it."""
    found = []
    for at, row in enumerate(logits.numpy()):
        place = begin + at
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        kept, weights = distribution(row, params, Said(ids[:begin], ids[begin:place]))
        chances = np.zeros(len(row), np.float64)
        chances[slice(None) if kept is None else kept] = weights / weights.sum()
        best = np.argsort(-probabilities, kind="stable")[:SHOWN].tolist()
        if ids[place] not in best:
            best[-1] = ids[place]
        found.append(
            [
                {
                    "id": i,
                    "text": chat.decode([i]),
                    "p": digits(float(probabilities[i])),
                    "sampled": digits(float(chances[i])),
                }
                for i in best
            ]
        )
    return found


def pack_attention(layers: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Of each head and row the positions that it looks at most: `top` of them, as uint16 positions and then float16
    weights, [layers, heads, rows, top] each, zlib and base64. What is left to 1 went to all other positions."""
    heads, rows, positions = layers[0].shape
    top = max(1, min(positions, 16, MOST_ATTENTION // (4 * len(layers) * heads * rows)))
    best = [layer.topk(top, -1) for layer in layers]
    places = torch.stack([one.indices for one in best]).to(torch.int32).numpy().astype("<u2")
    weights = torch.stack([one.values for one in best]).half().numpy().astype("<f2")
    packed = zlib.compress(places.tobytes() + weights.tobytes(), 9)
    return {"shape": [len(layers), heads, rows, top], "data": base64.b64encode(packed).decode()}


def unpack_attention(packed: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(positions, weights), [layers, heads, rows, top] each."""
    shape = tuple(packed["shape"])
    count = int(np.prod(shape))
    data = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(data, "<u2", count).reshape(shape), np.frombuffer(data, "<f2", count, 2 * count).reshape(shape)
