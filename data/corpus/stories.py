"""Word problems of two steps: each step is worked out like a sum, a difference or a product by itself."""

from random import Random

from data.corpus.arithmetic import add, go_on_from, last_integer, multiply, subtract
from data.corpus.tasks import Facts, Family, Pieces

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lena", "Max", "Eva", "Paul", "Nora", "Leo", "Ida")
THINGS = ("apples", "books", "pens", "coins", "cards", "stones", "eggs", "stamps", "shells", "cakes", "balls", "keys")
STARTS = (
    "{name} has {a} {things}.|{name} had {a} {things}.|{name} owns {a} {things}.|There are {a} {things} in a box.|"
    "A shop has {a} {things}.|{name} begins with {a} {things}.|On the table are {a} {things}.|"
    "{name} keeps {a} {things}."
)
PACKS = (
    "{name} has {a} boxes with {b} {things} each.|There are {a} bags. Each holds {b} {things}.|"
    "{name} buys {a} packs of {b} {things}.|{a} friends bring {b} {things} each.|There are {a} rows of {b} {things}.|"
    "{name} gets {b} {things} a day for {a} days.|Each of {a} boxes has {b} {things}.|"
    "{name} has {a} bags of {b} {things}."
)
CHANGES = {
    "+": "{name} buys {n} more.|{name} finds {n} more.|{name} gets {n} from a friend.|Then {n} more come.|"
    "{name} puts in {n}.|{name} adds {n} {things}.|A friend gives {name} {n} more.|Later {name} gets {n} new ones.|"
    "Then there are {n} more.",
    "-": "{name} gives away {n}.|{name} loses {n}.|{name} sells {n} of them.|Then {n} break.|{name} takes out {n}.|"
    "{name} gives {n} to a friend.|{n} are sold.|{n} get lost.|{name} uses {n}.|Then {n} are gone.",
}
QUESTIONS = (
    "How many {things} does {name} have now?|How many {things} are there now?|How many {things} are there in all?|"
    "How many {things} does {name} have?|How many are there then?|How many {things} are left?|How many is that?"
)
STORIES_HELD_OUT = {
    "+-": ("{name} starts with {a} {things}, gets {b} more and then loses {c}. How many {things} are left?",),
    "-+": ("{name} starts with {a} {things}, loses {b} and then gets {c} more. How many {things} are there now?",),
    "*+": ("{name} fills {a} boxes with {b} {things} each and has {c} more. How many {things} does {name} have?",),
    "*-": ("{name} fills {a} bags with {b} {things} each and gives away {c}. How many {things} are left?",),
}
OPERATIONS = {"+": add, "-": subtract, "*": multiply}


def sample_story(rng: Random) -> Facts:
    signs = rng.choice(tuple(STORIES_HELD_OUT))
    if signs[0] == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 30)
        top = a * b
    else:
        a = rng.randint(5, 99)
        b = rng.randint(2, 60) if signs[0] == "+" else rng.randint(2, a)
        top = a + b if signs[0] == "+" else a - b
    c = rng.randint(2, 60) if signs[1] == "+" else rng.randint(1, max(1, min(top, 99)))
    return signs, a, b, c, rng.choice(NAMES), rng.choice(THINGS)


def longer_story(rng: Random) -> Facts:
    """Begins with three digits, where `sample_story` has two."""
    signs, (a, b, c) = rng.choice(("+-", "-+")), (rng.randint(100, 400), rng.randint(10, 99), rng.randint(10, 99))
    return signs, a, b, c, rng.choice(NAMES), rng.choice(THINGS)


def ask_story(facts: Facts, rng: Random, unseen: bool) -> str:
    signs, a, b, c, name, things = facts
    if unseen:
        story = rng.choice(STORIES_HELD_OUT[signs])
    else:
        first = PACKS if signs[0] == "*" else STARTS
        parts = [rng.choice(first.split("|")), rng.choice(CHANGES[signs[1]].split("|")).replace("{n}", "{c}")]
        if signs[0] != "*":
            parts.insert(1, rng.choice(CHANGES[signs[0]].split("|")).replace("{n}", "{b}"))
        story = " ".join([*parts, rng.choice(QUESTIONS.split("|"))])
        if story.startswith("{name}") and rng.random() < 0.6:
            story = story.replace(". {name} ", rng.choice((", then {name} ", " and ", ", then ")), 1)
    return story.format(a=a, b=b, c=c, name=name, things=things)


def solve_story(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    signs, a, b, c, _, things = facts
    first_lines, first = OPERATIONS[signs[0]](a, b)
    second_lines, second = OPERATIONS[signs[1]](first, c)
    return "\n".join([*first_lines, *second_lines]), f"It is {second} {things}."


def story_truth(facts: Facts) -> int:
    signs, a, b, c, *_ = facts
    first = {"+": a + b, "-": a - b, "*": a * b}[signs[0]]
    return first + c if signs[1] == "+" else first - c


FAMILIES = (
    Family(
        "story",
        sample_story,
        lambda facts: [f"story {' '.join(map(str, facts[:4]))}"],
        ask_story,
        solve_story,
        lambda facts, answer: last_integer(answer) == story_truth(facts),
        lambda facts, rng: go_on_from(story_truth(facts), rng) if story_truth(facts) >= 0 else None,
        longer_story,
    ),
)
