"""Builds the source of a run's rows from its settings."""

from pathlib import Path

import console
from chat import Chat
from data.shard_format import END_OF_TEXT
from data.sources import Corpus, Generated, Item, Listed, Shards, WrittenRows, matching, read_items, records
from training.schema import Settings


def decide_source(settings: Settings, tells: bool = True) -> None:
    """Resolves `data.source: auto`: shards if there are any, else the corpus, and `tells` so. ValueError for rows that
    are named but not read."""
    data = settings.data
    if data.source == "corpus" and data.train is not None:
        raise ValueError(
            f"data.train names {data.train}, but data.source corpus generates its rows; set data.source=rows (JSON "
            "lines, Parquet, a data set's id) or data.source=shards (.bin), or leave data.train out"
        )
    if data.source == "auto":
        try:
            matching(data.train or "")
            data.source = "shards"
        except ValueError as error:
            data.source, settings.model.tokenizer = "corpus", data.corpus_tokenizer
            if tells:
                console.notice(f"{error}. Until then this run trains on the generated corpus.")


def build_source(settings: Settings, chat: Chat, tells: bool = True):
    """The items of each step; see data/sources.py. `tells`: says how many rows there are."""
    train, data, stage, batch, longest = settings.train, settings.data, settings.stage, *row_limits(settings)
    if data.pack and stage not in ("pretrain", "sft"):
        raise ValueError(
            f"data.pack puts rows of pretrain and sft into one sequence, but stage is {stage}; leave it out"
        )
    if data.mask_documents and (stage != "pretrain" or data.pack):
        raise ValueError(
            "data.mask_documents keeps documents apart within the unpacked rows of stage pretrain; leave it out"
        )
    if data.mask_documents and chat.tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(
            f"data.mask_documents looks for {END_OF_TEXT} between documents, which {settings.model.tokenizer} does not "
            "have; leave it out"
        )
    if data.source != "corpus" and data.train is None:
        raise ValueError(f"data.train must name the files of data.source {data.source}")
    if data.source == "shards":
        if stage != "pretrain":
            raise ValueError(f"data.source shards has no conversations for stage {stage}; use rows or corpus")
        vocabulary = chat.tokenizer.get_vocab_size()
        source = Shards(data.train, data.validation, train.seed, batch, longest, vocabulary)
        data.tokens = agreed("data.tokens", data.tokens, source.tokens, f"the files of {data.train}")
        data.fingerprint = agreed(
            "data.fingerprint", data.fingerprint, source.fingerprint, f"the files of {data.train}"
        )
        return source
    if data.source == "corpus":
        if data.hard + data.outside > 1:
            raise ValueError(f"data.hard {data.hard} and data.outside {data.outside} are more than all questions")

        def pieces(word: str) -> list[str]:
            return [chat.decode([index]) for index in chat.encode(word)]

        corpus = Corpus(data.seed, pieces, chat, data.hard, data.outside)
        makers = {"pretrain": corpus.text, "sft": corpus.conversation, "dpo": corpus.preference}
        source = Generated((makers | {"grpo": corpus.question})[stage], batch, longest)
        of = f"the corpus and {settings.model.tokenizer}"
        data.fingerprint = agreed("data.fingerprint", data.fingerprint, source.fingerprint(), of)
        return source
    if stage == "pretrain":
        raise ValueError("data.source rows is for sft, dpo and grpo; make shards of texts with data/shards.py tokenize")
    rows = WrittenRows(chat, data.turns, settings.grpo.thinking)
    make = {"sft": rows.conversation, "dpo": rows.preference, "grpo": rows.question}[stage]

    def read(place: str, split: str) -> tuple[list[Item], str]:
        found = records(place, split, data.subset, data.limit, Path(train.out))
        return read_items(place, found, make, longest, data.skip_share, tells)

    items, digest = read(data.train, data.split)
    data.fingerprint = agreed("data.fingerprint", data.fingerprint, digest, f"the rows of {data.train}")
    unseen = read(data.validation, data.validation_split)[0] if data.validation else []
    return Listed(items, unseen, batch, train.seed)


def row_limits(settings: Settings) -> tuple[int, int]:
    """The items of a step, and the most tokens that one may have."""
    train, grpo = settings.train, settings.grpo
    if settings.stage != "grpo":
        return train.batch, train.sequence
    if train.batch % grpo.group:
        raise ValueError(f"train.batch {train.batch} is no multiple of grpo.group {grpo.group}")
    if grpo.max_new_tokens >= train.sequence:
        raise ValueError(
            f"grpo.max_new_tokens {grpo.max_new_tokens} leaves no room for a prompt in train.sequence {train.sequence}"
        )
    return train.batch // grpo.group, train.sequence - grpo.max_new_tokens


def agreed(key: str, stated, found, whose: str):
    """The value of a key that is computed and saved with the run; ValueError if another one was stated."""
    if stated not in (None, found):
        raise ValueError(f"{key} is {stated}, but {whose} have {found}; use those it was made for, or leave it out")
    return found
