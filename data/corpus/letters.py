"""Families of letters: counting one in a word or two, counting all of them, spelling a word backwards.

A model sees pieces of words, not letters. So the traces spell a word piece by piece, each letter with its running
number; only the letters of a piece have to be memorised, and every piece occurs in many words.
"""

import re
from functools import cache
from pathlib import Path
from random import Random

from data.corpus.tasks import Facts, Family, Pieces, Problem, held_out, phrasings, pick

COUNT = phrasings(
    "the number of {letter}'s in {word}|the count of {letter} in {word}|how many {letter}'s there are in {word}|"
    "how often {letter} is in {word}|how many times {letter} occurs in {word}|the number of letters {letter} in {word}",
    "count the letter {letter} in {word}|count the {letter}'s in {word}|count {letter} in {word}|"
    "find how often {letter} comes in {word}|count how many {letter}'s {word} has|check {word} for the letter {letter}|"
    "count how many times {letter} occurs in {word}|count how often you see {letter} in {word}",
    "How many times does the letter {letter} appear in {word}?|How many {letter}'s are in {word}?|"
    "How often does {letter} occur in {word}?|How many times is {letter} in {word}?|How many {letter} in {word}?|"
    "How many letters {letter} does {word} have?|In {word}, how many times does {letter} appear?|"
    "How many times does the letter {letter} appear in the word {word}?|How many {letter}'s does {word} have?|"
    "How many times do you see {letter} in {word}?|How often is the letter {letter} found in {word}?|"
    "How many times does {word} contain {letter}?|How often can you find {letter} in the word {word}?|"
    "Of the letters in {word}, how many are {letter}?|How many {letter}'s do the letters of {word} have?|"
    "How many letters in {word} are {letter}?|How many of the letters of {word} are {letter}'s?|"
    "Of all letters in {word}, how many are {letter}?",
)
COUNT_HELD_OUT = ("Count how often {letter} appears in {word}.", "How many of the letters in {word} are {letter}?")
LENGTH = phrasings(
    "the number of letters in {word}|the length of {word}|how many letters {word} has|how long {word} is|"
    "the number of letters of the word {word}",
    "count the letters of {word}|count the letters in {word}|count how many letters {word} has",
    "How many letters does {word} have?|How many letters are in {word}?|How long is the word {word}?|"
    "How many letters does the word {word} have?|{word}: how many letters?|How long is {word}?",
)
LENGTH_HELD_OUT = ("How many letters are there in the word {word}?", "Count all letters in {word}.")
REVERSE = phrasings(
    "{word} backwards|the reverse of {word}|{word} spelled backwards|{word} in reverse|"
    "the word {word} from back to front",
    "spell {word} backwards|reverse the word {word}|reverse {word}|write {word} in reverse|turn {word} around|"
    "spell the word {word} backwards|read {word} backwards",
    "How do you spell {word} backwards?|What does {word} look like in reverse?|{word} backwards?|"
    "How is {word} written from back to front?",
)
REVERSE_HELD_OUT = ("Please write {word} backwards.", "Tell me the word {word} in reverse.")
QUOTES = ("{}", "{}", "{}", '"{}"', "'{}'")
ONSETS = "b bl br c ch cl cr d dr f fl fr g gr h j k l m n p pl pr qu r s sh sk sl sp st str sw t th tr v w y z"
NUCLEI = "a e i o u ai ea ee oo ou ie y"
CODAS = "- - - b ck d ff g l ll m n nd ng nt p r rr s ss st t tt x"  # "-": the syllable is open


@cache
def words() -> tuple[str, ...]:
    """English words in lower case; words.md says how the list was made."""
    return tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())


def pseudo_word(rng: Random) -> str:
    """Two to four random syllables, so that spelling can't be memorised word by word."""
    syllables = rng.randint(2, 4)
    parts = (rng.choice(kind.split()) for _ in range(syllables) for kind in (ONSETS, NUCLEI, CODAS))
    return "".join(parts).replace("-", "")[:14]


def sample_word(rng: Random, longest: int = 16) -> str:
    while True:
        word = pseudo_word(rng) if rng.random() < 0.3 else rng.choice(words())
        if len(word) <= longest:
            return word.capitalize() if rng.random() < 0.08 else word


def word_keys(*spelled: str) -> list[str]:
    return [f"word {word.lower()}" for word in spelled]


def letter_for(word: str, rng: Random) -> str:
    """Mostly a letter of the word, often one that it has more than once."""
    letters = word.lower()
    several = [letter for letter in letters if letters.count(letter) > 1]
    if several and rng.random() < 0.5:
        return rng.choice(several)
    return rng.choice(letters) if rng.random() < 0.75 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def sample_count(rng: Random) -> Facts:
    if rng.random() < 0.8:
        word = sample_word(rng)
        return (word,), letter_for(word, rng)
    first = sample_word(rng, 10)
    while held_out(*word_keys(second := sample_word(rng, 10))) != held_out(*word_keys(first)):
        pass
    return (first, second), letter_for(first + second, rng)


def quoted(rng: Random, *spelled: str) -> str:
    quotes = rng.choice(QUOTES)
    return " and ".join(quotes.format(word) for word in spelled)


def ask_count(facts: Facts, rng: Random, unseen: bool) -> str:
    spelled, letter = facts
    return pick(rng, COUNT, COUNT_HELD_OUT, unseen).format(letter=letter, word=quoted(rng, *spelled))


def ask_word(trained: tuple[str, ...], held_out: tuple[str, ...]):
    return lambda facts, rng, unseen: pick(rng, trained, held_out, unseen).format(word=quoted(rng, facts[0]))


def solve_count(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    """`ber: b1 e1 r2`: every letter with the count that is reached after it."""
    spelled, letter = facts
    lines, count = [f"{letter} in {' and '.join(spelled)}"], 0
    for word in spelled:
        for piece in pieces(word):
            steps = []
            for character in piece.lower():
                count += character == letter
                steps.append(f"{character}{count}")
            lines.append(f"{piece}: {' '.join(steps)}")
    times = "1 time" if count == 1 else f"{count} times"
    return "\n".join(lines), f"The letter {letter} appears {times} in {' and '.join(spelled)}."


def numbered_letters(word: str, pieces: Pieces) -> list[str]:
    """`st: s1 t2`: every letter with its place in the word."""
    lines, place = [f"the word {word}"], 0
    for piece in pieces(word):
        lines.append(f"{piece}: " + " ".join(f"{letter}{place + n}" for n, letter in enumerate(piece.lower(), 1)))
        place += len(piece)
    return lines


def solve_length(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    return "\n".join(numbered_letters(facts[0], pieces)), f"{facts[0]} has {len(facts[0])} letters."


def solve_reverse(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    word = facts[0]
    backwards = [(letter, len(word) - n) for n, letter in enumerate(reversed(word.lower()))]
    lines = [*numbered_letters(word, pieces), "back: " + " ".join(f"{letter}{place}" for letter, place in backwards)]
    return "\n".join(lines), f"{word} backwards is {'-'.join(letter for letter, _ in backwards)}."


def check_count(facts: Facts, answer: str) -> bool:
    spelled, letter = facts
    counts = re.findall(r"\d+", answer)
    return len(counts) == 1 and int(counts[0]) == "".join(spelled).lower().count(letter)


def check_length(facts: Facts, answer: str) -> bool:
    counts = re.findall(r"\d+", answer)
    return len(counts) == 1 and int(counts[0]) == len(facts[0])


def check_reverse(facts: Facts, answer: str) -> bool:
    spelled = re.findall(r"\w(?:-\w)+", answer)
    return len(spelled) == 1 and spelled[0].replace("-", "") == facts[0].lower()[::-1]


def another_letter(facts: Facts, rng: Random) -> tuple[str, Problem]:
    letter = letter_for("".join(facts[0]), rng)
    words_of_it = ("and the letter {}?", "And how many {}'s?", "What about {}?", "and {}?")
    return rng.choice(words_of_it).format(letter), Problem("count", (facts[0], letter))


FAMILIES = (
    Family(
        "count",
        sample_count,
        lambda facts: word_keys(*facts[0]),
        ask_count,
        solve_count,
        check_count,
        another_letter,
    ),
    Family(
        "length",
        lambda rng: (sample_word(rng, 12),),
        lambda facts: word_keys(facts[0]),
        ask_word(LENGTH, LENGTH_HELD_OUT),
        solve_length,
        check_length,
        lambda facts, rng: ("And backwards?", Problem("reverse", facts)) if len(facts[0]) <= 10 else None,
    ),
    Family(
        "reverse",
        lambda rng: (sample_word(rng, 10),),
        lambda facts: word_keys(facts[0]),
        ask_word(REVERSE, REVERSE_HELD_OUT),
        solve_reverse,
        check_reverse,
        lambda facts, rng: ("How many letters is that?", Problem("length", facts)),
    ),
)
