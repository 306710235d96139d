"""The offline corpus: conversations with thinking traces, a pure function of seed and index.

python data/corpus/examples.py --seed 0 --count 3        prints examples
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import console
from data.corpus import arithmetic, dates, letters, stories, talk
from data.corpus.tasks import Family, Pieces, Problem, draw, held_out, pick, with_courtesy
from data.corpus.tokenizer import TINY, pieces_of

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*arithmetic.FAMILIES, *stories.FAMILIES, *letters.FAMILIES, *dates.FAMILIES)
}
WEIGHTS = {"sum": 3, "difference": 3, "product": 3, "larger": 2.5, "sort": 3, "story": 3, "count": 4, "length": 1}
WEIGHTS |= {"reverse": 2, "weekday": 1.5, "date": 1.5}
HARD = tuple(family for family in FAMILIES.values() if family.hard)
SWITCH = re.compile(r"\s*/(?:no_)?think$")


class Example(NamedTuple):
    """A conversation up to the user's last turn, and the assistant's reply."""

    messages: list[dict[str, str]]
    thinking: bool
    """The chat template's `enable_thinking`."""
    trace: str
    """Empty without thinking."""
    answer: str
    problem: Problem | None
    """None for small talk."""


def solve(problem: Problem, pieces: Pieces) -> tuple[str, str]:
    return FAMILIES[problem.family].solve(problem.facts, pieces)


def check(problem: Problem | None, answer: str) -> bool:
    """Whether an answer (the text after the thinking) is right: the evaluation's verdict and a reward. A question
    outside of every family (None) has to be declined."""
    return talk.is_refusal(answer) if problem is None else FAMILIES[problem.family].check(problem.facts, answer)


def is_test(problem: Problem) -> bool:
    """Whether any key of the question is held out, so that training must not contain it."""
    return any(held_out(key) for key in FAMILIES[problem.family].keys(problem.facts))


def training_example(seed: int, index: int, pieces: Pieces, unseen: bool = False) -> Example:
    """Example `index` of the training stream. No held-out question, word or phrasing is ever in it.

    `unseen` makes one for validation, which no index of training gives: its questions are held out, and it is no small
    talk, of which there is little.
    """
    rng = Random(f"train {seed} {index}")
    system = [{"role": "system", "content": rng.choice(talk.SYSTEM)}] if rng.random() < 0.2 else []
    kind = rng.random()
    thinking = rng.random() < 0.85
    if kind < 0.04 and not unseen:  # refusals are left to data/corpus/preferences.py
        question, trace, answer = talk.small_talk(rng)
        return Example([*system, user(question)], thinking, trace if thinking else "", answer, None)
    family = FAMILIES[rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]]
    problem = Problem(family.name, draw(family, rng, test=unseen))
    messages = [*system, user(with_courtesy(family.ask(problem.facts, rng, False), rng, False))]
    if kind < 0.16 and (second := second_turn(problem, messages, rng, pieces, unseen)):
        messages, problem = second
    return finished(messages, problem, rng, thinking, pieces)


def document(seed: int, index: int, pieces: Pieces, unseen: bool = False) -> str:
    """Text `index` for pretraining: a worked example as in a textbook, without any chat format."""
    rng = Random(f"document {seed} {index}")
    family = FAMILIES[rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]]
    facts = draw(family, rng, test=unseen)
    trace, answer = family.solve(facts, pieces)
    question = family.ask(facts, rng, False) + "\n" if rng.random() < 0.7 else ""
    return f"{question}{trace}\n{answer}"


def second_turn(
    problem: Problem, messages: list, rng: Random, pieces: Pieces, unseen: bool
) -> tuple[list, Problem] | None:
    """The conversation with one more turn, or None where this problem has no follow-up of the wanted kind."""
    follow_ups = FAMILIES[problem.family].follow_ups
    follow_up = follow_ups(problem.facts, rng) if follow_ups else None
    if follow_up is None or is_test(follow_up[1]) != unseen:
        return None
    words, following = follow_up
    answered = {"role": "assistant", "content": solve(problem, pieces)[1]}
    return [*messages, answered, user(words)], following


def finished(messages: list, problem: Problem, rng: Random, thinking: bool, pieces: Pieces) -> Example:
    """The example with its solution; sometimes with /think or /no_think at the end of the question."""
    trace, answer = solve(problem, pieces)
    if thinking and rng.random() < 0.06:
        thinking_wanted = rng.random() < 0.5
        messages[-1] = user(messages[-1]["content"] + (" /think" if thinking_wanted else " /no_think"))
        return Example(messages, True, trace if thinking_wanted else "", answer, problem)
    return Example(messages, thinking, trace if thinking else "", answer, problem)


def unseen_examples(seed: int, count: int, pieces: Pieces, phrasings: str = "trained") -> Iterator[Example]:
    """`count` unseen questions, the families in turn; `phrasings="held-out"` also uses held-out phrasings."""
    unseen = phrasings == "held-out"
    for index in range(count):
        rng = Random(f"test {seed} {index} {phrasings}")
        family = tuple(FAMILIES.values())[index % len(FAMILIES)]
        problem = Problem(family.name, draw(family, rng, test=True))
        question = with_courtesy(family.ask(problem.facts, rng, unseen), rng, unseen)
        system = pick(rng, talk.SYSTEM, talk.SYSTEM_HELD_OUT, unseen)
        messages = [{"role": "system", "content": system}] if rng.random() < 0.2 else []
        yield Example([*messages, user(question)], True, *solve(problem, pieces), problem)


def question_example(seed: int, index: int, pieces: Pieces, hard: float, outside: float) -> Example:
    """Question `index` for training by reward; a share `hard` of them is harder than every supervised example, a share
    `outside` is to be declined."""
    rng = Random(f"question {seed} {index}")
    kind = rng.random()
    if kind < hard:
        return posed(rng.choice(HARD), rng, pieces, test=False, hard=True)
    if kind < hard + outside:
        question, trace, answer = talk.outside(rng)
        return Example([user(question)], True, trace, answer, None)
    return posed(FAMILIES[rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]], rng, pieces, test=False, hard=False)


def hard_examples(seed: int, count: int, pieces: Pieces) -> Iterator[Example]:
    """`count` unseen hard questions, in turn from the families that have any."""
    for index in range(count):
        yield posed(HARD[index % len(HARD)], Random(f"hard {seed} {index}"), pieces, test=True, hard=True)


def outside_examples(seed: int, count: int) -> Iterator[Example]:
    """`count` questions outside every family, in phrasings and about subjects that training never has."""
    for index in range(count):
        question, trace, answer = talk.outside(Random(f"outside {seed} {index}"), held_out=True)
        yield Example([user(question)], True, trace, answer, None)


def posed(family: Family, rng: Random, pieces: Pieces, test: bool, hard: bool) -> Example:
    """A single question of a family in a trained phrasing, with thinking."""
    problem = Problem(family.name, draw(family, rng, test, hard))
    messages = [{"role": "system", "content": rng.choice(talk.SYSTEM)}] if rng.random() < 0.2 else []
    question = user(with_courtesy(family.ask(problem.facts, rng, False), rng, False))
    return Example([*messages, question], True, *solve(problem, pieces), problem)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def completion(example: Example) -> str:
    """What the assistant writes after the chat template's generation prompt, its end token included."""
    if example.thinking:
        return f"<think>\n{example.trace}\n</think>\n\n{example.answer}<|im_end|>"
    return f"{example.answer}<|im_end|>"  # the template has already written the empty thinking


def main() -> None:
    parser = console.ArgumentParser(description="Prints examples of the offline corpus.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--test", action="store_true", help="held-out questions in held-out phrasings")
    arguments = parser.parse_args()
    pieces = pieces_of(TINY)
    if arguments.test:
        examples = unseen_examples(arguments.seed, arguments.count, pieces, "held-out")
    else:
        examples = (training_example(arguments.seed, index, pieces) for index in range(arguments.count))
    for example in examples:
        for message in example.messages:
            print(f"[{message['role']}] {message['content']}")
        print(f"[assistant] {completion(example)}\n")


if __name__ == "__main__":
    console.run(main)
