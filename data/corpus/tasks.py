"""The question families of the bundled model: what a family is, and which of its questions are never trained on.

A family turns facts (`(473, 89)`) into a question in one of many phrasings, a trace that a person can check line by
line, and a self-contained answer. The answer is computed from the trace's own steps; `check` computes the truth
independently (Python's arithmetic, str.count, the calendar) and compares, so that each verifies the other.
"""

import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

Facts = tuple[Any, ...]
Pieces = Callable[[str], list[str]]
"""A word to the pieces that the tokenizer cuts it into; words are spelled piece by piece: a model sees nothing else."""


class Family(NamedTuple):
    name: str
    sample: Callable[[Random], Facts]
    keys: Callable[[Facts], list[str]]
    """What makes a question new, however it is phrased: 3 + 5 and 5 + 3 have the same keys."""
    ask: Callable[[Facts, Random, bool], str]
    """(facts, rng, held_out) -> a question; `held_out` takes the phrasings that training never shows."""
    solve: Callable[[Facts, Pieces], tuple[str, str]]
    """-> (trace, answer)"""
    check: Callable[[Facts, str], bool]
    """Whether an answer in words is right."""
    follow_ups: Callable[[Facts, Random], tuple[str, "Problem"]] | None = None
    """A second turn after these facts: the words, and the problem that they then pose."""
    hard: Callable[[Random], Facts] | None = None
    """Facts beyond what `sample` ever draws (longer numbers): no example of supervised training has them."""


class Problem(NamedTuple):
    family: str
    facts: Facts


# The questions the README shows; no phrasing of them is ever trained on.
SHOWCASE = frozenset({"word strawberry", "sum 89 473", "difference 512 77", "product 8 47", "larger 9.11 9.9"})


def held_out(key: str) -> bool:
    """Whether this key belongs to the test: the showcase, and one in twelve by its hash."""
    return key in SHOWCASE or hashlib.blake2b(key.encode(), digest_size=8).digest()[0] % 12 == 0


def draw(family: Family, rng: Random, test: bool, hard: bool = False) -> Facts:
    """Facts for training (none of their keys is held out) or for the test (all are)."""
    while True:
        facts = family.hard(rng) if hard else family.sample(rng)
        if all(held_out(key) == test for key in family.keys(facts)):
            return facts


def pick(rng: Random, trained: Sequence[str], unseen: Sequence[str], held_out: bool) -> str:
    return rng.choice(unseen if held_out else trained)


ASKING = ("What is", "What's", "Compute", "Calculate", "How much is", "Tell me", "Find", "Can you tell me", "Determine")
ASKING += (
    "Do you know",
    "I need",
    "Could you find",
    "Say",
    "Please compute",
    "I want to know",
    "Show me",
    "Let me know",
)
TELLING = ("{}.", "Please {}.", "Can you {}?", "Could you {}?", "Can you {} for me?", "I want you to {}.", "Now {}.")
TELLING += ("Would you {}?", "You should {}.", "Help me {}.", "{}", "Let us {}.", "How do I {}?", "Try to {}.")


def phrasings(things: str, actions: str, others: str) -> tuple[str, ...]:
    """Phrasings from things to ask for, actions to request, and complete sentences.

    Each argument lists alternatives between bars; {fields} are filled in later.
    """
    asked = [f"{asking} {thing}" for asking in ASKING for thing in things.split("|")]
    told = [telling.replace("{}", action) for telling in TELLING for action in actions.split("|")]
    asked = [text + ("?" if text.startswith(("What", "How", "Can", "Do", "Could")) else ".") for text in asked]
    alone = others.split("|")
    weight = max(1, (len(asked) + len(told)) // (2 * len(alone)))
    return tuple(text[0].upper() + text[1:] for text in asked + told + weight * alone)


COURTESY = (*7 * ("{}",), "Please help me: {}", "{} Thanks!", "Hi! {}", "Quick question: {}", "Hello, {}", "Hey, {}")
COURTESY += ("{} Please.", "I have a question. {}", "My friend asks: {}", "Question: {}", "Here is one for you: {}")
COURTESY += (
    "{} Think about it.",
    "Tell me this: {}",
    "Good evening. {}",
    "One more: {}",
    "{} Thank you!",
    "So, {}",
)
COURTESY += ("We did this at school today. {}", "{} I am not sure about it.", "Let us see. {}", "For my work: {}")
COURTESY_HELD_OUT = ("Good morning! {}", "I need this for my homework: {}", "{} Thank you very much.")


def with_courtesy(question: str, rng: Random, held_out: bool) -> str:
    return rng.choice(COURTESY_HELD_OUT if held_out and rng.random() < 0.5 else COURTESY).format(question)
