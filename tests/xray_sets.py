"""Generated data sets of every shape, as clean as sets can be."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [f"{first}{last}" for first in ("ri", "sto", "ligh", "gar") for last in ("ver", "ne", "ten", "den")]


def sentence(number: int, length: int = 12) -> str:
    """Text that no other number has, and shares no run of words with."""
    digest = hashlib.sha512(str(number).encode()).digest()
    return " ".join(f"{WORDS[digest[place] % 16]}{number if place % 3 == 0 else ''}" for place in range(length)) + "."


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def findings(found: dict) -> dict[str, list[int]]:
    assert all(finding["count"] == len(finding["rows"]) for finding in found["findings"])
    return {finding["id"]: finding["rows"] for finding in found["findings"]}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if place % 2 == 0 else 'Assistant'}: {text}" for place, text in enumerate(turns))


def make(shape: str, i: int) -> dict:
    """Row i of a clean set."""
    one, two, three = sentence(3 * i), sentence(3 * i + 1, 20), sentence(3 * i + 2, 20)
    longer = two if i % 2 else two + " Indeed."
    return {
        "pretraining": {"text": f"{one} {two} {three}", "url": f"https://example.org/{i}", "score": i / 7},
        "dolly": {"instruction": one, "context": two if i % 2 else "", "response": three, "category": "open_qa"},
        "alpaca": {"instruction": one, "input": "", "output": two},
        "prompt": {"prompt": one, "completion": two},
        "messages": {"messages": [user(one), assistant(two), user(three), assistant(sentence(9**6 + i))]},
        "sharegpt": {"conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": two}]},
        "preference": {"prompt": one, "chosen": longer, "rejected": three},
        "hh": {"chosen": hh(one, two, one, longer), "rejected": hh(one, two, one, three)},
        "choices": {"question": one, "choices": ["red", "green", "blue", f"{i}"], "answer": i % 4},
        "gsm8k": {"question": one, "answer": f"{two}\n#### {i}"},
        "rag": {"question": one, "context": two, "answers": {"text": [three], "answer_start": [0]}},
    }[shape]


def tree(count: int) -> list[dict]:
    """OASST1's rows: each tree a question, two answers with ranks, a question and an answer under the first."""
    rows = []
    for i in range(count):
        ids = [f"{i}-{name}" for name in "abcde"]
        shape = [
            (None, "prompter", None),
            (0, "assistant", 0),
            (0, "assistant", 1),
            (1, "prompter", None),
            (3, "assistant", 0),
        ]
        for number, (parent, role, rank) in enumerate(shape):
            rows.append(
                {
                    "message_id": ids[number],
                    "parent_id": None if parent is None else ids[parent],
                    "message_tree_id": ids[0],
                    "role": role,
                    "text": sentence(10 * i + number, 15),
                    "lang": "en" if i % 2 else "es",
                    "rank": rank,
                    "labels": {"name": ["spam"], "value": [0.0]},
                }
            )
    return rows
