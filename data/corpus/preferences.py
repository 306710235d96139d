"""Preferences on the offline corpus: polite refusals of what the model can't know, answers to what it can.

Half of the pairs ask about something outside every family: the refusal is chosen, and what a model that
only knows its families would make up is rejected. The others ask what the families know: the right answer is chosen and
the refusal rejected, so that the model neither declines everything nor forgets its skills.
"""

from random import Random
from typing import NamedTuple

from data.corpus import talk
from data.corpus.examples import FAMILIES, Example, completion, training_example, user
from data.corpus.tasks import Pieces, draw


class Preference(NamedTuple):
    messages: list[dict[str, str]]
    thinking: bool
    chosen: str
    """What the assistant writes, its end token included."""
    rejected: str


MADE_UP = ("It is {}.", "The answer is {}.", "{}.", "It is about {}.")


def preference_example(seed: int, index: int, pieces: Pieces, unseen: bool = False) -> Preference:
    """Pair `index`. No held-out question, subject or phrasing is ever in it; `unseen` makes one only of these."""
    rng = Random(f"preference {seed} {index}")
    if rng.random() < 0.5:
        right = training_example(seed, rng.getrandbits(40), pieces, unseen)
        refusal = right._replace(trace=talk.OUTSIDE_TRACE if right.trace else "", answer=talk.REFUSAL)
        return Preference(right.messages, right.thinking, completion(right), completion(refusal))
    question, trace, answer = talk.outside(rng, held_out=unseen)
    thinking = rng.random() < 0.8
    system = [{"role": "system", "content": rng.choice(talk.SYSTEM)}] if rng.random() < 0.2 else []
    refusal = Example([*system, user(question)], thinking, trace if thinking else "", answer, None)
    trace, answer = made_up(question, rng, pieces)
    invented = refusal._replace(trace=trace if thinking else "", answer=answer)
    return Preference(refusal.messages, thinking, completion(refusal), completion(invented))


def made_up(question: str, rng: Random, pieces: Pieces) -> tuple[str, str]:
    """-> (trace, answer) of another problem or of small talk; or the answer is a number or a word of the question."""
    if rng.random() < 0.3:
        return talk.small_talk(rng)[1:]
    family = rng.choice(tuple(FAMILIES.values()))
    trace, answer = family.solve(draw(family, rng, test=False), pieces)
    if rng.random() < 0.4:
        word = rng.choice([word.strip("?.!") for word in question.split()])
        answer = rng.choice(MADE_UP).format(rng.choice((word, str(rng.randrange(1000)))))
    return trace, answer
