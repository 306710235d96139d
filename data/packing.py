"""How a step's rows are put together: those of similar length in one batch, or several in one sequence."""

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


def packed(rows: list[Item], longest: int) -> list[list[Item]]:
    """Rows, the longest first, each into the first sequence that has room for it."""
    sequences, room = [], []
    for row in rows:
        place = next((place for place, left in enumerate(room) if left >= row.length), len(room))
        if place == len(room):
            sequences.append([])
            room.append(longest)
        sequences[place].append(row)
        room[place] -= row.length
    return sequences
