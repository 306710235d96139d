"""How a step's rows are packed and dealt to processes and micro-batches."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from data.packing import dealt, packed


class Sized(NamedTuple):
    number: int
    length: int


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths=lengths, least=st.integers(1, 8))
def test_every_row_is_in_one_sequence(lengths, least):
    rows = [Sized(number, length) for number, length in enumerate(lengths)]
    sequences = packed(rows, 50, least)
    assert sorted(row for sequence in sequences for row in sequence) == rows
    assert all(0 < sequence.length <= 50 for sequence in sequences)
    assert len(sequences) >= min(least, len(rows))
    assert len(sequences) <= max(least, 1 + 2 * sum(lengths) // 50)  # first fit leaves but one sequence half empty


@given(lengths=lengths, processes=st.integers(1, 4), micro_batches=st.integers(1, 8))
def test_each_process_has_its_own_and_as_many_micro_batches(lengths, processes, micro_batches):
    sequences = packed([Sized(number, length) for number, length in enumerate(lengths)], 50, processes)
    if len(sequences) < processes:
        return
    shares = [dealt(sequences, micro_batches, processes, rank) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1 and 1 <= len(shares[0]) <= micro_batches
    given_out = [sequence for share in shares for batch in share for sequence in batch]
    assert sorted(map(sorted, given_out)) == sorted(map(sorted, sequences))
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) - min(sizes) <= 1


def test_a_step_is_packed_as_one():
    """Sixteen micro-batches need not be filled where seven sequences hold all rows."""
    rows = [Sized(number, 20 + number % 30) for number in range(48)]
    sequences = packed(rows, 256)
    total = sum(row.length for row in rows)
    assert len(sequences) == -(-total // 256)
    assert len(dealt(sequences, 16, 1, 0)) == len(sequences)
    assert [len(dealt(sequences, 16, 2, rank)) for rank in (0, 1)] == [len(sequences) // 2] * 2
