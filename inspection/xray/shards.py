"""The X-ray of shards of token ids (data/shard_format.py): documents, lengths, ids out of range, compression."""

import hashlib
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from chat import Chat
from data.inspection import USUAL_SEPARATOR
from data.shard_format import END_OF_TEXT, Shard, windows_of
from inspection.xray.rubric import Rule

GPT2_VOCABULARY = 50257
SHOWN = 300  # tokens of an example


def examine(
    paths: list[Path], chat: Chat | None, rules: dict[str, Rule], limit: int | None, sequence: int
) -> dict[str, Any]:
    """The keys of xray.json. A document that continues in the next file is one. `sequence`: tokens of a training row,
    by which train.py cuts the files."""
    shards = [Shard(path) for path in paths]
    width = shards[0].tokens.dtype.itemsize
    end = chat.tokenizer.token_to_id(END_OF_TEXT) if chat is not None else USUAL_SEPARATOR[width]
    if end is None:
        raise ValueError(
            f"--tokenizer {chat.source}: has no {END_OF_TEXT}, which comes before each document of a shard"
        )
    vocabulary = GPT2_VOCABULARY if chat is None and width == 2 else 1 << 32
    if chat is not None:
        vocabulary = max(chat.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    lengths: list[int] = []
    seen: dict[bytes, int] = {}
    found: dict[str, list[int]] = {}
    counts = np.zeros(0, np.int64)
    examples, tokens, complete = [], 0, True
    rest: list[np.ndarray] = []  # of a document that is not over yet
    begun = False

    def close() -> None:
        ids = np.concatenate(rest) if rest else np.empty(0, np.uint32)
        row = len(lengths)
        if not begun and not len(ids):
            return
        lengths.append(len(ids))
        if not len(ids):
            found.setdefault("empty_document", []).append(row)
        else:
            digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=12).digest()
            if seen.setdefault(digest, row) != row:
                found.setdefault("duplicate", []).append(row)
            if int(ids.max()) >= vocabulary:
                found.setdefault("token_out_of_range", []).append(row)
        if len(examples) < 3 and len(ids):
            first = [int(token) for token in ids[:SHOWN]]
            text = chat.decode(first) if chat is not None and max(first) < vocabulary else " ".join(map(str, first))
            examples.append({"row": row, "where": f"document {row:,}", "text": text, "why": f"{len(ids):,} tokens"})

    for shard in shards:
        edges = np.flatnonzero(shard.tokens == end)
        tokens += len(shard)
        if len(shard):
            more = np.bincount(np.asarray(shard.tokens))
            counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
            counts[: len(more)] += more
        start = 0
        for edge in edges:
            rest.append(np.asarray(shard.tokens[start:edge]))
            close()
            rest, begun, start = [], True, int(edge) + 1
            if limit is not None and len(lengths) >= limit:
                complete = False
                break
        if not complete:
            break
        rest.append(np.asarray(shard.tokens[start:]))
    if complete:
        close()
    spread = np.array(lengths)
    text_bytes = None
    if chat is not None:
        known = np.flatnonzero(counts)
        text_bytes = sum(int(counts[token]) * len(chat.token_bytes(int(token))) for token in known if token != end)
    wide = max(1, -(-(int(np.quantile(spread, 0.99)) + 1) // 24)) if len(spread) else 1
    places, sizes = np.unique(np.minimum(spread // wide, 24), return_counts=True)
    histogram = np.zeros(int(places.max(initial=0)) + 1, np.int64)
    histogram[places] = sizes
    return {
        "rows": len(lengths) if complete else None,
        "rows_read": len(lengths),
        "complete": complete,
        "shape": "shards",
        "signature_column": None,
        "splits": {"train": len(lengths)},
        "columns": [{"name": "ids", "type": shards[0].tokens.dtype.name, "nulls": 0}],
        "lengths": {
            "ids": {
                "tokens": {
                    "median": float(np.median(spread)),
                    "p95": float(np.quantile(spread, 0.95)),
                    "max": int(spread.max()),
                    "min": int(spread.min()),
                    "total": int(spread.sum()),
                    "histogram": {
                        "edges": [wide * place for place in range(len(histogram))]
                        + [max(wide * len(histogram), int(spread.max()) + 1)],
                        "counts": histogram.tolist(),
                    },
                }
            }
        }
        if len(spread)
        else {},
        "duplicates": {"exact": len(found.get("duplicate", [])), "near": 0},
        "repeated_prompts": [],
        "findings": [
            {
                "id": name,
                "rule": rules[name].condition or rules[name].reason,
                "reason": rules[name].reason,
                "severity": rules[name].severity,
                "count": len(rows),
                "rows": rows[:10_000],
                "shown": [{"row": row, "where": f"document {row:,}", "text": "", "why": ""} for row in rows[:3]],
            }
            for name, rows in sorted(found.items())
            if name in rules
        ],
        "leakage": [],
        "mask": None,
        "examples": examples,
        "shards": {
            "files": [{"path": str(shard.path), "tokens": len(shard)} for shard in shards],
            "tokens": tokens,
            "documents": len(lengths),
            "sequence": sequence,
            "training_rows": sum(map(windows_of, map(len, shards), repeat(sequence))),
            "separator": int(end),
            "vocabulary": vocabulary if vocabulary < 1 << 32 else None,
            "distinct_tokens": int((counts > 0).sum()),
            "tokens_out_of_range": int(counts[vocabulary:].sum()) if vocabulary < 1 << 32 else 0,
            "bytes_per_token": text_bytes / max(1, tokens - int(counts[end] if end < len(counts) else 0))
            if text_bytes is not None
            else None,
        },
    }
