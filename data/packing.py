"""How a step's rows are grouped: rows of similar length in one batch, or several packed in one sequence."""

from typing import Protocol, TypeVar


class Sized(Protocol):
    @property
    def length(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


def in_parts(items: list[Item], parts: int) -> list[list[Item]]:
    """Items of similar length together, in at most `parts` lists."""
    items = sorted(items, key=lambda item: item.length)
    cut = [items[part * len(items) // parts : (part + 1) * len(items) // parts] for part in range(parts)]
    return [chosen for chosen in cut if chosen]


class Sequence(list[Item]):
    """Rows that are computed as one sequence; none of them attends to another."""

    @property
    def length(self) -> int:
        return sum(row.length for row in self)


def packed(rows: list[Item], longest: int, least: int = 1) -> list[Sequence[Item]]:
    """All rows of a step, the longest first, each into the first sequence of at most `longest` tokens with enough room.

    At least `least` sequences if there are that many rows, since each process needs one.
    """
    rows, sequences = sorted(rows, key=lambda row: -row.length), []
    for row in rows:
        place = next((s for s in sequences if s.length + row.length <= longest), None)
        if place is None:
            sequences.append(place := Sequence())
        place.append(row)
    while len(sequences) < min(least, len(rows)):
        whole = max((s for s in sequences if len(s) > 1), key=lambda s: s.length)
        sequences.append(Sequence(whole[1::2]))
        whole[:] = whole[::2]
    return sequences


def dealt(sequences: list[Sequence[Item]], micro_batches: int, processes: int, rank: int) -> list[list[Sequence[Item]]]:
    """One process's micro-batches of packed sequences: at most `micro_batches`, as many as each other process has, with
    sequences of similar length in each. There must be at least as many sequences as processes."""
    each = min(micro_batches, len(sequences) // processes)
    return in_parts(sequences, each * processes)[rank::processes]
