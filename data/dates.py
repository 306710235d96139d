"""Families of the calendar: the weekday so many days away, and the date so many days away (in a common year)."""

import datetime
import re
from random import Random

from data.tasks import Facts, Family, Pieces, pick

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31}
MONTHS |= {"September": 30, "October": 31, "November": 30, "December": 31}
MONTH_NAMES = tuple(MONTHS)

WEEKDAY = {
    "after": (
        "What day is {days} after {day}?",
        "If today is {day}, what day is it in {days}?",
        "Today is {day}. What day will it be in {days}?",
        "Which weekday comes {days} after {day}?",
        "It is {day}. Which day is it {days} from now?",
        "Name the day {days} after {day}.",
    ),
    "before": (
        "What day is {days} before {day}?",
        "If today is {day}, what day was it {days} ago?",
        "Today is {day}. What day was it {days} ago?",
        "Which weekday comes {days} before {day}?",
        "Name the day {days} before {day}.",
    ),
}
WEEKDAY_HELD_OUT = {
    "after": ("What weekday will it be {days} after {day}?", "Count {days} on from {day}. Which day is that?"),
    "before": ("What weekday was it {days} before {day}?", "Count {days} back from {day}. Which day is that?"),
}
DATE = {
    "after": (
        "What date is {days} after {date}?",
        "If today is {date}, what is the date in {days}?",
        "Today is {date}. What date will it be in {days}?",
        "Which date comes {days} after {date}?",
        "Give me the date {days} after {date}.",
    ),
    "before": (
        "What date is {days} before {date}?",
        "If today is {date}, what was the date {days} ago?",
        "Today is {date}. What date was it {days} ago?",
        "Which date comes {days} before {date}?",
        "Give me the date {days} before {date}.",
    ),
}
DATE_HELD_OUT = {
    "after": ("Tell me the date that is {days} after {date}.", "It is {date}. Which date is it {days} from now?"),
    "before": ("Tell me the date that is {days} before {date}.", "It is {date}. Which date was it {days} ago?"),
}


def in_days(count: int) -> str:
    return f"{count} day{'' if count == 1 else 's'}"


def sample_weekday(rng: Random) -> Facts:
    return rng.choice(WEEKDAYS), rng.randint(1, rng.choice((6, 20, 60))), rng.choice(("after", "after", "before"))


def ask_weekday(facts: Facts, rng: Random, unseen: bool) -> str:
    day, count, way = facts
    return pick(rng, WEEKDAY[way], WEEKDAY_HELD_OUT[way], unseen).format(day=day, days=in_days(count))


def solve_weekday(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    day, count, way = facts
    lines, rest = [f"{day}, {count} {way}"], count
    if count >= 7:
        rest = count % 7
        lines.append(f"weeks: {count}-{count - rest}={rest}")
    place = WEEKDAYS.index(day)
    for step in range(1, rest + 1):
        place = (place + (1 if way == "after" else -1)) % 7
        lines.append(f"{step} {WEEKDAYS[place]}")
    return "\n".join(lines), f"{in_days(count)} {way} {day} is {WEEKDAYS[place]}."


def check_weekday(facts: Facts, answer: str) -> bool:
    day, count, way = facts
    monday = datetime.date(2024, 1, 1) + datetime.timedelta(WEEKDAYS.index(day))
    truth = f"{monday + datetime.timedelta(count if way == 'after' else -count):%A}"
    named = re.findall("|".join(WEEKDAYS), answer)
    return bool(named) and named[-1] == truth


def sample_date(rng: Random) -> Facts:
    month = rng.choice(MONTH_NAMES)
    return month, rng.randint(1, MONTHS[month]), rng.randint(1, 28), rng.choice(("after", "after", "before"))


def ask_date(facts: Facts, rng: Random, unseen: bool) -> str:
    month, day, count, way = facts
    return pick(rng, DATE[way], DATE_HELD_OUT[way], unseen).format(date=f"{month} {day}", days=in_days(count))


def solve_date(facts: Facts, pieces: Pieces) -> tuple[str, str]:
    month, day, count, way = facts
    lines, place = [f"{month} {day}, {count} {way}"], MONTH_NAMES.index(month)
    if way == "after":
        target = day + count
        lines += [f"{day}+{count}={target}", f"{month} has {MONTHS[month]} days"]
        if target > MONTHS[month]:
            place, after = (place + 1) % 12, target - MONTHS[month]
            lines.append(f"{target}-{MONTHS[month]}={after}, {MONTH_NAMES[place]}")
            target = after
    elif day > count:
        target = day - count
        lines.append(f"{day}-{count}={target}")
    else:
        place = (place - 1) % 12
        length = MONTHS[MONTH_NAMES[place]]
        target = length + day - count
        lines.append(f"{MONTH_NAMES[place]} has {length} days")
        lines += [f"{day}+{length}={day + length}", f"{day + length}-{count}={target}"]
    return "\n".join(lines), f"{in_days(count)} {way} {month} {day} is {MONTH_NAMES[place]} {target}."


def check_date(facts: Facts, answer: str) -> bool:
    month, day, count, way = facts
    start = datetime.date(2023, MONTH_NAMES.index(month) + 1, day)
    truth = start + datetime.timedelta(count if way == "after" else -count)
    named = re.findall(rf"({'|'.join(MONTH_NAMES)}) (\d+)", answer)
    return bool(named) and named[-1] == (MONTH_NAMES[truth.month - 1], str(truth.day))


FAMILIES = (
    Family(
        "weekday",
        sample_weekday,
        lambda facts: [f"weekday {' '.join(map(str, facts))}"],
        ask_weekday,
        solve_weekday,
        check_weekday,
    ),
    Family(
        "date",
        sample_date,
        lambda facts: [f"date {' '.join(map(str, facts))}"],
        ask_date,
        solve_date,
        check_date,
    ),
)
