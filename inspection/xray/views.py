"""What a row says, whatever its shape: the columns that the rubric's conditions and `--sql` see beside the set's own.

A set's shape is decided once, by its columns. `view` then gives, for each batch:

    _text        all of the row's text, by which duplicates are found
    _instruction what is asked (the first turn of a chat); null for texts
    _prompt      the same with what it is asked about
    _response    what is answered (the last turn of the assistant); null for texts and pairs
    _chosen, _rejected      the two answers of a pair
    _turns       messages of a chat, else null
    _problems    what no SQL over single values can see: names of rules

What a conversation or a pair is, is data/conversations.py's, the code that train.py reads rows with.
"""

import unicodedata
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data import conversations
from inspection.xray.reading import Batch

TREE = {"message_id", "parent_id", "text", "role"}
MESSAGES = (*conversations.DIALOGUES, "dialogue", "dialog")
PASSAGES = ("context", "contexts", "documents", "passages", "ctxs", "passage")
CHOICES = ("choices", "options", "endings")
LABELS = ("answer", "label", "answerKey", "answer_idx", "correct_answer", "gold")
ANSWERS = (*conversations.ANSWERED, "answers")
TEXTS = ("text", "content", "body", "document", "article", "raw_content")
COLUMNS = {
    "_text": pa.string(),
    "_instruction": pa.string(),
    "_prompt": pa.string(),
    "_response": pa.string(),
    "_chosen": pa.string(),
    "_rejected": pa.string(),
    "_turns": pa.int32(),
    "_problems": pa.list_(pa.string()),
}


class Shape(NamedTuple):
    name: str  # pretraining, sft, chat, tree, preference, eval, rag
    column: str  # the one that tells
    fields: tuple[str | None, ...] = ()
    """sft: instruction, context, response. eval: question, choices, label (None: only prompts). rag: question,
    contexts, answer."""


def shape_of(batch: Batch) -> Shape:
    """The shape that the columns of a set tell. ValueError where none of them is text."""
    table, names = batch.table, set(batch.table.column_names)
    if names >= TREE:
        return Shape("tree", "parent_id")
    if {"chosen", "rejected"} <= names:
        return Shape("preference", "chosen")
    for name in MESSAGES:
        if name in names and any(isinstance(record.get(name), list) for record in batch.records()[:100]):
            return Shape("chat", name)
    question = _first(("question", "query"), names)
    if (choices := _first(CHOICES, names)) and (asked := question or _first(("ctx", "sentence", "prompt"), names)):
        return Shape("eval", choices, (asked, choices, _first(LABELS, names)))
    if question and (about := _first(PASSAGES, names)) and (answer := _first(ANSWERS, names)):
        return Shape("rag", about, (question, about, answer))
    asked, answer = _first(conversations.ASKED, names), _first(conversations.ANSWERED, names)
    if asked and answer and asked == question and answer == "answer":
        return Shape("eval", question, (question, None, answer))
    if asked and answer:
        about = next((name for name in conversations.ABOUT if name in names and name != asked), None)
        return Shape("sft", answer, (asked, about, answer))
    if asked and not answer and not _first(TEXTS, names) and pa.types.is_string(table.schema.field(asked).type):
        return Shape("eval", asked, (asked, None, None))  # only prompts
    texts = [name for name in names if pa.types.is_string(table.schema.field(name).type)]
    if not texts:
        raise ValueError(f"no column holds text (there are {', '.join(table.column_names[:8])})")
    longest = max(texts, key=lambda name: (_characters(table[name]), name))
    return Shape("pretraining", _first(TEXTS, set(texts)) or longest)


def _first(wanted: tuple[str, ...], names: set[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _characters(column: pa.ChunkedArray) -> int:
    return pc.sum(pc.utf8_length(column)).as_py() or 0


def view(shape: Shape, batch: Batch) -> pa.Table:
    """The columns above for each row of a batch."""
    table = batch.table
    if shape.name in ("pretraining", "sft", "rag") or (shape.name == "eval" and shape.fields[1] is None):
        made = _flat(shape, table)
    else:
        read = {"chat": _chat, "preference": _preference, "eval": _choices, "tree": _tree}[shape.name]
        made = _rows(batch.records(), read, shape)
    if "_problems" not in made:
        made["_problems"] = _repetitions(made.get("_response", made["_text"]))
    size = table.num_rows
    return pa.table({name: made.get(name, pa.nulls(size, kind)).cast(kind) for name, kind in COLUMNS.items()})


# --- columns at a time ---


def _flat(shape: Shape, table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Texts, and instructions with one answer: as conversations.conversation joins them."""
    if shape.name == "pretraining":
        return {"_text": as_text(table, shape.column)}
    asked, about, answer = shape.fields
    prompt = instruction = as_text(table, asked)
    if answer is None:
        return {"_text": prompt, "_instruction": instruction, "_prompt": prompt}
    response = as_text(table, answer)
    if about:
        context = as_text(table, about)
        with_context = pc.binary_join_element_wise(prompt, context, "\n\n")
        prompt = pc.if_else(pc.equal(pc.utf8_length(context), 0), prompt, with_context)
    text = pc.binary_join_element_wise(prompt, response, "\n")
    return {"_text": text, "_instruction": instruction, "_prompt": prompt, "_response": response}


def as_text(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column as text, null as the empty one; lists and objects as the texts in them."""
    if name not in table.column_names:
        return pa.chunked_array([pa.array([""] * table.num_rows, pa.string())])
    column = table[name]
    if pa.types.is_nested(column.type):
        column = pa.chunked_array([pa.array(["\n".join(texts_in(value)) for value in column.to_pylist()], pa.string())])
    return pc.fill_null(column.cast(pa.string()), "")


def texts_in(value: Any) -> list[str]:
    """The texts inside lists and objects, in their order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in texts_in(part)] if isinstance(value, list) else []


REPETITIVE_CHARACTERS, REPETITIVE_RATIO = 200, 0.1


def _repetitions(texts: pa.ChunkedArray) -> pa.Array:
    """`repetitive` where a text over 200 characters packs to less than a tenth: ordinary prose packs to a half."""
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    found: list[list[str]] = [[]] * len(texts)
    for row in (lengths > REPETITIVE_CHARACTERS).nonzero()[0]:
        if repeats(texts[int(row)].as_py()):
            found[row] = ["repetitive"]
    return pa.array(found, pa.list_(pa.string()))


def repeats(text: str) -> bool:
    """Of a long text the first and the last 2,000 characters tell; a piece from the middle decides if it is packed."""
    middle = len(text) // 2
    if len(text) <= REPETITIVE_CHARACTERS or text.count(text[middle : middle + 12]) < 6:
        return False
    sample = (text if len(text) <= 4000 else text[:2000] + text[-2000:]).encode()
    return len(sample) > REPETITIVE_CHARACTERS and len(zlib.compress(sample, 1)) < REPETITIVE_RATIO * len(sample)


# --- a row at a time ---


def plain(value: Any) -> Any:
    """Text that Arrow takes: half a surrogate pair becomes U+FFFD."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value


def _rows(records: list[dict], read: Callable[[dict, Shape], dict], shape: Shape) -> dict[str, pa.Array]:
    made = [read(record, shape) for record in records]
    return {
        name: pa.array([plain(row.get(name)) for row in made], kind)
        for name, kind in COLUMNS.items()
        if any(name in row for row in made)
    }


def turns_of(messages: list[dict]) -> list[tuple[str, str]]:
    """(role, all text) of each normalised message; a call of a tool is text too."""
    made = []
    for message in messages:
        said = [message.get("reasoning_content"), message.get("content"), *texts_in(message.get("tool_calls"))]
        made.append((message["role"], "\n".join(filter(None, said))))
    return made


def alternates(roles: list[str]) -> bool:
    """After a system's turn, user and assistant take turns; tools answer an assistant, who then goes on."""
    before = "system"
    for place, role in enumerate(roles):
        allowed = {
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }.get(before, ())
        if not (place == 0 and role in ("system", "developer")) and role not in allowed:
            return False
        before = "system" if role == "developer" else role
    return True


def is_empty(text: str) -> bool:
    """Whether nothing of it would show: white space, and marks of no width."""
    return not text.strip() or all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def _dialogue_problems(turns: list[tuple[str, str]]) -> list[str]:
    problems = [] if alternates([role for role, _ in turns]) else ["role_alternation"]
    if any(is_empty(text) for _, text in turns) or not turns:
        problems.append("empty_turn")
    return problems


def _chat(record: dict, shape: Shape) -> dict:
    try:
        turns = turns_of(conversations.dialogue(record) or [])
        problems = _dialogue_problems(turns)
    except ValueError:
        turns = [("?", "\n".join(texts_in(record.get(shape.column))))]
        problems = ["not_trainable"] if turns[0][1] else ["empty_turn"]
    if any(role == "assistant" and repeats(text) for role, text in turns):
        problems.append("repetitive")
    said = dict(reversed(turns))
    answers = [text for role, text in turns if role == "assistant"]
    return {
        "_text": "\n".join(text for _, text in turns),
        "_instruction": said.get("user", ""),
        "_prompt": said.get("user", ""),
        "_response": answers[-1] if answers else "",
        "_turns": len(turns),
        "_problems": problems,
    }


def _preference(record: dict, shape: Shape) -> dict:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    text = "\n".join(texts_in([record.get("prompt"), chosen, rejected]))
    made = {"_text": text, "_prompt": "", "_chosen": "", "_rejected": "", "_problems": []}
    try:
        found = conversations.preference(record)
    except ValueError:
        empty = not texts_in(chosen) or not texts_in(rejected)
        return made | {"_problems": ["empty_turn" if empty else "not_trainable"]}
    if found is None:
        return made | {"_problems": ["equal_pair" if chosen == rejected else "different_prompts"]}
    turns = [turns_of([*found.asked.messages, answer]) for answer in (found.chosen, found.rejected)]
    problems = _dialogue_problems(turns[0])
    if is_empty(turns[1][-1][1]) and "empty_turn" not in problems:
        problems.append("empty_turn")
    if any(repeats(dialogue[-1][1]) for dialogue in turns):
        problems.append("repetitive")
    prompt = "\n".join(text for _, text in turns[0][:-1])
    asked = {"_instruction": turns[0][0][1], "_prompt": prompt}
    return made | asked | {"_chosen": turns[0][-1][1], "_rejected": turns[1][-1][1], "_problems": problems}


def _choices(record: dict, shape: Shape) -> dict:
    asked, choices, label = (record.get(name) if name else None for name in shape.fields)
    names: list[Any] = []
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": [...]}; MedMCQA-like: {"A": ..., "B": ...}
        names = list(choices.get("label") or choices)
        choices = choices.get("text") or list(choices.values())
    options = [str(choice).strip() for choice in choices] if isinstance(choices, list) else []
    question = "\n".join(texts_in(asked))
    problems = []
    if len(set(options)) < len(options):
        problems.append("equal_choices")
    known = [*map(str, range(len(options))), *(chr(65 + number) for number in range(len(options))), *map(str, names)]
    known += options
    if label is not None and "\n".join(texts_in(label) or [str(label)]).strip() not in known:
        problems.append("label_out_of_range")
    if repeats(question):
        problems.append("repetitive")
    answer = str(label) if label is not None else ""
    text = "\n".join([question, *options])
    asked = {"_instruction": question, "_prompt": question}
    return asked | {"_text": text, "_response": answer, "_problems": problems}


def _tree(record: dict, shape: Shape) -> dict:
    """One message; what its place in the tree is, inspection/xray/tree.py looks at."""
    text, root = "\n".join(texts_in(record.get("text"))), record.get("parent_id") is None
    problems = ["empty_turn"] if is_empty(text) else []
    if repeats(text):
        problems.append("repetitive")
    asked = text if root else None
    return {"_text": text, "_instruction": asked, "_prompt": asked, "_problems": problems}
