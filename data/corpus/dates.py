"""Families of the calendar: the weekday so many days away, and the date so many days away (in a common year)."""

import datetime
import re
from random import Random

from data.corpus.arithmetic import add, compare, take_away
from data.corpus.tasks import Facts, Family, Pieces, phrasings, pick

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31}
MONTHS |= {"September": 30, "October": 31, "November": 30, "December": 31}
MONTH_NAMES = tuple(MONTHS)

WEEKDAY = {
    "after": phrasings(
        "the day {days} after {day}|the weekday {days} after {day}|the day that comes {days} after {day}",
        "name the day {days} after {day}|find the weekday {days} after {day}|add {days} to {day}|"
        "go {days} on from {day}|go {days} forward from {day}",
        "What day is {days} after {day}?|If today is {day}, what day is it in {days}?|"
        "Which day comes {days} after {day}?|"
        "Today is {day}. What day will it be in {days}?|Which weekday comes {days} after {day}?|"
        "It is {day}. Which day is it {days} from now?|What day of the week is {days} after {day}?|"
        "If it is {day}, which day is it {days} later?",
    ),
    "before": phrasings(
        "the day {days} before {day}|the weekday {days} before {day}|the day that came {days} before {day}",
        "name the day {days} before {day}|find the weekday {days} before {day}|take {days} from {day}|"
        "go {days} back from {day}",
        "What day is {days} before {day}?|If today is {day}, what day was it {days} ago?|"
        "Which day was {days} before {day}?|"
        "Today is {day}. What day was it {days} ago?|Which weekday comes {days} before {day}?|"
        "It is {day}. Which day was {days} ago?|What day of the week is {days} before {day}?|"
        "If it is {day}, which day was it {days} earlier?",
    ),
}
WEEKDAY_HELD_OUT = {
    "after": ("What weekday will it be {days} after {day}?", "Count {days} on from {day}. Which day is that?"),
    "before": ("What weekday was it {days} before {day}?", "Count {days} back from {day}. Which day is that?"),
}
DATE = {
    "after": phrasings(
        "the date {days} after {date}|the day {days} after {date}|the date that comes {days} after {date}",
        "name the date {days} after {date}|find the date {days} after {date}|add {days} to {date}|"
        "go {days} on from {date}",
        "What date is {days} after {date}?|If today is {date}, what is the date in {days}?|"
        "Today is {date}. What date will it be in {days}?|Which date comes {days} after {date}?|"
        "What day of the year is {days} after {date}?|If it is {date}, which date is it {days} later?|"
        "It is {date}. What is the date {days} from now?|Today is {date}. Which date is it in {days}?|"
        "It is {date}. Which date comes in {days}?|Which date is it {days} after {date}?",
    ),
    "before": phrasings(
        "the date {days} before {date}|the day {days} before {date}|the date that came {days} before {date}",
        "name the date {days} before {date}|find the date {days} before {date}|take {days} from {date}|"
        "go {days} back from {date}",
        "What date is {days} before {date}?|If today is {date}, what was the date {days} ago?|"
        "Today is {date}. What date was it {days} ago?|Which date comes {days} before {date}?|"
        "What day of the year is {days} before {date}?|If it is {date}, which date was it {days} earlier?|"
        "It is {date}. What was the date {days} ago?|Today is {date}. Which date was {days} ago?|"
        "It is {date}. Which date came {days} before?|Which date was it {days} before {date}?",
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


def sample_far_weekday(rng: Random) -> Facts:
    return rng.choice(WEEKDAYS), rng.randint(61, 99), rng.choice(("after", "after", "before"))


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
        steps, target = add(day, count)
        length = MONTHS[month]
        lines += [*steps, f"{month} has {length} days", *compare(str(target), str(length))[0]]
        if target > length:
            place = (place + 1) % 12
            steps, target = take_away(target, length)
            lines += [*steps, MONTH_NAMES[place]]
    else:
        lines += compare(str(day), str(count))[0]
        if day > count:
            steps, target = take_away(day, count)
        else:
            place = (place - 1) % 12
            length = MONTHS[MONTH_NAMES[place]]
            longer, target = add(day, length)
            steps, target = take_away(target, count)
            steps = [f"{MONTH_NAMES[place]} has {length} days", *longer, *steps]
        lines += steps
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
        hard=sample_far_weekday,
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
