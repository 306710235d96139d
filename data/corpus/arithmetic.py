"""Families of numbers: sums, differences, products, comparing and sorting.

The traces work digit by digit, as on paper. Each line names the place and its digits before the result, since a small
model can look up `7+8+1=16` but can't decide first and read afterwards.
"""

import re
from decimal import Decimal
from random import Random

from data.corpus.tasks import Facts, Family, Pieces, Problem, phrasings, pick

PLACES = ("ones", "tens", "hundreds", "thousands", "ten-thousands", "hundred-thousands", "millions", "ten-millions")
FRACTIONS = ("tenths", "hundredths", "thousandths")


def number(rng: Random, digits: int) -> int:
    """A number of exactly so many digits (0 counts as one digit)."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def last_integer(text: str) -> int | None:
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def column_digits(number: int, width: int) -> list[int]:
    """The digits from the ones upwards, zeros to the width."""
    return [number // 10**place % 10 for place in range(width)]


def add(a: int, b: int) -> tuple[list[str], int]:
    """Column addition: its lines and the sum."""
    width = max(len(str(a)), len(str(b)))
    lines, carry, written = [f"{a} + {b}"], 0, ""
    for place, (x, y) in enumerate(zip(column_digits(a, width), column_digits(b, width), strict=True)):
        total = x + y + carry
        written = str(total if place == width - 1 else total % 10) + written
        lines.append(f"{PLACES[place]}: {x}+{y}{'+1' if carry else ''}={total} -> {written}")
        carry = total // 10
    return lines, int(written)


def subtract(a: int, b: int) -> tuple[list[str], int]:
    """Which is larger, then column subtraction; a negative result is the other one's negative."""
    compared, order = compare(str(a), str(b))
    if order < 0:
        lines, result = take_away(b, a)
        return [f"{a} - {b}", *compared, f"so -({b} - {a})", *lines[1:]], -result
    lines, result = take_away(a, b)
    return [lines[0], *compared, *lines[1:]], result


def take_away(a: int, b: int) -> tuple[list[str], int]:
    """Column subtraction with borrowing, a >= b."""
    lines, borrow, written = [f"{a} - {b}"], 0, ""
    width = len(str(a))
    for place, (x, y) in enumerate(zip(column_digits(a, width), column_digits(b, width), strict=True)):
        taken = f"-{y}{'-1' if borrow else ''}"
        digit = x - y - borrow
        borrow = int(digit < 0)
        step = f"{x}{taken}, borrow: {x + 10}{taken}={digit + 10}" if borrow else f"{x}{taken}={digit}"
        written = str(digit + 10 * borrow) + written
        lines.append(f"{PLACES[place]}: {step} -> {written}")
    return lines, int(written)


def multiply(a: int, b: int) -> tuple[list[str], int]:
    """Column multiplication by one digit, the longer number first; the carried digit is added on the spot."""
    lines, carry, written = [f"{a} * {b}"], 0, ""
    if b > 9:
        a, b = b, a
        lines.append(f"so {a} * {b}")
    width = len(str(a))
    for place, x in enumerate(column_digits(a, width)):
        total = x * b + carry
        written = str(total if place == width - 1 else total % 10) + written
        carried = f", {x * b}+{carry}={total}" if carry else ""
        lines.append(f"{PLACES[place]}: {x}*{b}={x * b}{carried} -> {written}")
        carry = total // 10
    return lines, int(written)


def compare(a: str, b: str) -> tuple[list[str], int]:
    """Two decimals place by place from the highest to the first that differs: lines, and -1, 0 or 1."""
    a, b = same_length(a, b)
    whole, _, part = a.partition(".")
    names = [*reversed(PLACES[: len(whole)]), *FRACTIONS[: len(part)]]
    lines = []
    for name, x, y in zip(names, a.replace(".", ""), b.replace(".", ""), strict=True):
        lines.append(f"{name}: {x} and {y}: {'same' if x == y else 'more' if x > y else 'less'}")
        if x != y:
            return lines, 1 if x > y else -1
    return lines, 0


def same_length(a: str, b: str) -> tuple[str, str]:
    """Two decimals padded with zeros, so that their digits align: 7.1, 12 to 07.1, 12.0."""
    (whole_a, _, part_a), (whole_b, _, part_b) = a.partition("."), b.partition(".")
    whole, part = max(len(whole_a), len(whole_b)), max(len(part_a), len(part_b))
    padded = (f"{w.rjust(whole, '0')}.{p.ljust(part, '0')}" for w, p in ((whole_a, part_a), (whole_b, part_b)))
    a, b = (number.rstrip(".") for number in padded)
    return a, b


# --- sums, differences, products ---

SUM = phrasings(
    "{a} + {b}|{a} plus {b}|the sum of {a} and {b}|{a} and {b} added up|the total of {a} and {b}",
    "add {a} to {b}|add {a} and {b}|add up {a} and {b}|put {a} and {b} together|sum up {a} and {b}",
    "{a} + {b} = ?|{a}+{b}|{a} + {b}|What do you get if you add {a} and {b}?|{a} plus {b} equals what?|"
    "I have {a} and get {b} more. How many is that?|How much do {a} and {b} make?|{a} plus {b} is?|"
    "If I add {b} to {a}, what do I get?|There were {a}, then {b} came. How many are there now?",
)
SUM_HELD_OUT = ("Please work out {a} + {b}.", "How many are {a} and {b} together?", "Give me the sum {a} + {b}.")
DIFFERENCE = phrasings(
    "{a} - {b}|{a} minus {b}|the difference of {a} and {b}|{a} less {b}|the difference {a} - {b}",
    "subtract {b} from {a}|take {b} from {a}|take {b} away from {a}|deduct {b} from {a}",
    "{a} - {b} = ?|{a}-{b}|{a} - {b}|What do you get if you take {b} from {a}?|{a} minus {b} equals what?|"
    "I have {a} and lose {b}. How many is that?|How much is left if I take {b} from {a}?|{a} minus {b} is?|"
    "If I subtract {b} from {a}, what do I get?|There were {a}, then {b} went away. How many are there now?",
)
DIFFERENCE_HELD_OUT = ("Please work out {a} - {b}.", "What is left of {a} without {b}?", "Give me {a} minus {b} now.")
PRODUCT = phrasings(
    "{a} * {b}|{a} times {b}|the product of {a} and {b}|{a} x {b}|{a} multiplied by {b}",
    "multiply {a} by {b}|multiply {a} and {b}|multiply {a} with {b}|take {a} times {b}",
    "{a} * {b} = ?|{a}*{b}|{a} x {b}|What do you get if you multiply {a} and {b}?|{a} times {b} equals what?|"
    "I have {a} rows of {b}. How many is that?|{a} times {b} is?|If I multiply {a} by {b}, what do I get?|"
    "How many are {a} groups of {b}?|What does {a} times {b} make?",
)
PRODUCT_HELD_OUT = ("Please work out {a} * {b}.", "How many are {a} times {b}?", "Give me the product {a} * {b}.")


def column_family(
    name: str, sign: str, work, trained, held_out, sample, truth, commutes: bool, follow_ups, hard=None
) -> Family:
    def solve(facts: Facts, pieces: Pieces) -> tuple[str, str]:
        lines, result = work(*facts)
        return "\n".join(lines), f"{facts[0]} {sign} {facts[1]} = {result}."

    def keys(facts: Facts) -> list[str]:
        a, b = sorted(facts) if commutes else facts
        return [f"{name} {a} {b}"]

    def ask(facts: Facts, rng: Random, unseen: bool) -> str:
        return pick(rng, trained, held_out, unseen).format(a=facts[0], b=facts[1])

    def check(facts: Facts, answer: str) -> bool:
        return last_integer(answer) == truth(*facts)

    return Family(name, sample, keys, ask, solve, check, follow_ups, hard)


def two_numbers(rng: Random) -> Facts:
    return number(rng, rng.randint(1, 4)), number(rng, rng.randint(1, 4))


def mostly_descending(rng: Random) -> Facts:
    facts = two_numbers(rng)
    return facts if rng.random() < 0.2 else tuple(sorted(facts, reverse=True))


def by_one_digit(rng: Random) -> Facts:
    facts = number(rng, rng.choice((1, 2, 2, 3, 3))), number(rng, 1)
    return facts if rng.random() < 0.7 else facts[::-1]


def longer_by_one_digit(rng: Random) -> Facts:
    facts = number(rng, 4), rng.randint(2, 9)
    return facts if rng.random() < 0.7 else facts[::-1]


MORE = ("and {b} more?", "Now add {b}.", "plus {b}?", "And if I add {b} to that?", "add {b} to it")
FEWER = ("and {b} less?", "Now subtract {b}.", "minus {b}?", "And if I take {b} away?", "take {b} from it")
TIMES = ("and times {b}?", "Now multiply it by {b}.", "times {b}?", "And {b} times as much?", "multiply that by {b}")


def go_on_from(result: int, rng: Random) -> tuple[str, Problem]:
    """A second turn that continues with the number of the first answer."""
    b = number(rng, rng.choice((1, 1, 2, 3)))
    if 0 <= result < 1000 and rng.random() < 0.25:
        b = number(rng, 1)
        return rng.choice(TIMES).format(b=b), Problem("product", (result, b))
    if result < 0 or rng.random() < 0.5:
        return rng.choice(MORE).format(b=b), Problem("sum", (max(result, 0), b))
    return rng.choice(FEWER).format(b=b), Problem("difference", (result, b))


def sum_goes_on(facts: Facts, rng: Random) -> tuple[str, Problem]:
    return go_on_from(facts[0] + facts[1], rng)


def difference_goes_on(facts: Facts, rng: Random) -> tuple[str, Problem] | None:
    return go_on_from(facts[0] - facts[1], rng) if facts[0] >= facts[1] else None


def product_goes_on(facts: Facts, rng: Random) -> tuple[str, Problem]:
    return go_on_from(facts[0] * facts[1], rng)


# --- which is larger ---

LARGER = phrasings(
    "the {more} of {a} and {b}|the {more} one of {a} and {b}|the {more} number, {a} or {b}|the {more} of {a} or {b}",
    "compare {a} and {b} and name the {more} one|say which is {more}, {a} or {b}|pick the {more} of {a} and {b}",
    "Which is {more}, {a} or {b}?|Which number is {more}: {a} or {b}?|What is {more}, {a} or {b}?|"
    "Is {a} or {b} {more}?|{a} or {b}, which is {more}?|Compare {a} and {b}. Which is {more}?|"
    "{a} or {b}: which is {more}?|"
    "Of {a} and {b}, which one is {more}?|Which of {a} and {b} is {more}?|Which of the two is {more}: {a} or {b}?|"
    "Between {a} and {b}, which is {more}?|Which has the {more} value, {a} or {b}?",
)
LARGER_HELD_OUT = ("Which one is {more}: {a} or {b}?", "Of the numbers {a} and {b}, which is {more}?")
LARGER_WORDS = {"larger": ("larger", "bigger", "greater"), "smaller": ("smaller", "lower")}


def decimals(rng: Random) -> str:
    digits = rng.randint(1, 3)
    return f"{rng.randrange(10**digits):0{digits}d}"


def sample_pair(rng: Random) -> Facts:
    """Decimals that often share their whole part, some whole numbers, now and then two equal ones."""
    if rng.random() < 0.25:
        digits = rng.randint(1, 4)
        a, b = str(number(rng, digits)), str(number(rng, digits if rng.random() < 0.7 else rng.randint(1, 4)))
    else:
        whole = number(rng, rng.choice((1, 1, 2)))
        other = whole if rng.random() < 0.7 else number(rng, rng.choice((1, 1, 2)))
        a, b = f"{whole}.{decimals(rng)}", f"{other}.{decimals(rng)}"
        missing = 3 - len(a.partition(".")[2])
        if rng.random() < 0.05 and missing:
            b = a + "0" * rng.randint(1, missing)
    return a, b, rng.choice(("larger", "larger", "smaller"))


def ask_larger(facts: Facts, rng: Random, unseen: bool) -> str:
    a, b, more = facts
    return pick(rng, LARGER, LARGER_HELD_OUT, unseen).format(a=a, b=b, more=rng.choice(LARGER_WORDS[more]))


def solve_larger(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    a, b, more = facts
    lines, order = compare(a, b)
    trace = "\n".join([f"{a} and {b}, {more}", " and ".join(same_length(a, b)), *lines])
    if order == 0:
        return trace, f"{a} and {b} are equal."
    trace += f"\n{a} is {'more' if order > 0 else 'less'}, {b} is {'less' if order > 0 else 'more'}"
    first, second = (a, b) if (order > 0) == (more == "larger") else (b, a)
    return trace, f"{first} is {more} than {second}."


def check_larger(facts: Facts, answer: str) -> bool:
    a, b, more = facts
    if Decimal(a) == Decimal(b):
        return "equal" in answer
    winner = (max if more == "larger" else min)(Decimal(a), Decimal(b))
    named = re.findall(r"\d+(?:\.\d+)?", answer)
    return bool(named) and "equal" not in answer and Decimal(named[0]) == winner


# --- sorting ---

SORT = phrasings(
    "{list} sorted from {first} to {last}|{list} in order from {first} to {last}|the order of {list}, {first} first",
    "sort {list} from {first} to {last}|put {list} in order, {first} first|order {list} from {first} to {last}|"
    "arrange {list} from {first} to {last}|sort these from {first} to {last}: {list}|sort {list}, {first} first|"
    "sort the numbers {list} from {first} to {last}|put these numbers in order, {first} first: {list}|"
    "line up {list} from {first} to {last}|put the numbers {list} in order from {first} to {last}",
    "Sort these numbers from {first} to {last}: {list}|{list}: sort them from {first} to {last}.|"
    "How do you order {list} from {first} to {last}?|In order from {first} to {last}: {list}|"
    "Here are numbers: {list}. Sort them, {first} first.",
)
SORT_HELD_OUT = ("Please order {list}, {first} first.", "Put these in order from {first} to {last}: {list}")


def sample_list(rng: Random) -> Facts:
    digits = rng.choice((1, 2, 2, 2, 3))
    numbers = tuple(number(rng, rng.choice((digits, 2))) for _ in range(rng.randint(3, 5)))
    return numbers, rng.choice(("smallest", "smallest", "largest"))


def ask_sort(facts: Facts, rng: Random, unseen: bool) -> str:
    numbers, first = facts
    last = "largest" if first == "smallest" else "smallest"
    return pick(rng, SORT, SORT_HELD_OUT, unseen).format(list=", ".join(map(str, numbers)), first=first, last=last)


def solve_sort(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    """Insertion: `062: 009 029 062 086` inserts 62 among the earlier ones, all with at least three digits."""
    numbers, first = facts
    done: list[int] = []
    lines, width = [" ".join(map(str, numbers)) + f", {first} first"], max(3, *(len(str(number)) for number in numbers))
    for number in numbers:
        done = sorted([*done, number], reverse=first == "largest")
        lines.append(f"{number:0{width}d}: {' '.join(f'{n:0{width}d}' for n in done)}")
    return "\n".join(lines), f"{', '.join(map(str, done))}."


def check_sort(facts: Facts, answer: str) -> bool:
    numbers, first = facts
    return [int(n) for n in re.findall(r"\d+", answer)] == sorted(numbers, reverse=first == "largest")


FAMILIES = (
    column_family(
        "sum",
        "+",
        add,
        SUM,
        SUM_HELD_OUT,
        two_numbers,
        lambda a, b: a + b,
        True,
        sum_goes_on,
    ),
    column_family(
        "difference",
        "-",
        subtract,
        DIFFERENCE,
        DIFFERENCE_HELD_OUT,
        mostly_descending,
        lambda a, b: a - b,
        False,
        difference_goes_on,
    ),
    column_family(
        "product",
        "*",
        multiply,
        PRODUCT,
        PRODUCT_HELD_OUT,
        by_one_digit,
        lambda a, b: a * b,
        True,
        product_goes_on,
        longer_by_one_digit,
    ),
    Family(
        "larger",
        sample_pair,
        lambda facts: [f"larger {' '.join(sorted(facts[:2]))}"],
        ask_larger,
        solve_larger,
        check_larger,
        lambda facts, rng: (
            f"And which is {'smaller' if facts[2] == 'larger' else 'larger'}?",
            Problem("larger", (facts[0], facts[1], "smaller" if facts[2] == "larger" else "larger")),
        ),
    ),
    Family(
        "sort",
        sample_list,
        lambda facts: [f"sort {' '.join(map(str, sorted(facts[0])))}"],
        ask_sort,
        solve_sort,
        check_sort,
    ),
)
