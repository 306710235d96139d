"""Columns of text, processed as a whole: no Python object per row."""

import unicodedata
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PLAIN = bytes(b" "[0] if code in b"\t\n\v\f\r\x1c\x1d\x1e\x1f" else code for code in bytes(range(256)).lower())


def in_parts(texts: pa.Array, size: int) -> Iterator[pa.Array]:
    """The texts in parts of about `size` bytes, each in memory of its own."""
    ends, start = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)), 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + size, side="right")))
        yield pa.concat_arrays([texts[start:stop], pa.array([], texts.type)])
        start = stop


def lines(texts: pa.Array) -> pa.Array:
    """The form shared by texts that differ only in case and white space; null for null and for white space."""
    texts = pa.concat_arrays([texts, pa.array([], pa.string())])  # a slice begins at 0 then
    valid, offsets, data = texts.buffers()
    plain = (data or pa.py_buffer(b"")).to_pybytes().translate(PLAIN)  # ASCII to ASCII: UTF-8 stays valid
    white = np.frombuffer(plain, np.uint8) == ord(" ")
    again = np.flatnonzero(white[1:] & white[:-1]) + 1
    starts = np.frombuffer(offsets, np.int32, len(texts) + 1) if offsets else np.zeros(1, np.int32)
    again = again[~np.isin(again, starts)]  # after the end of another text
    plain = np.delete(np.frombuffer(plain, np.uint8), again)
    starts = (starts - np.searchsorted(again, starts)).astype(np.int32)
    made = pa.StringArray.from_buffers(len(texts), pa.py_buffer(starts), pa.py_buffer(plain), valid)
    made = pc.ascii_trim(made, " ")
    other = pc.invert(pc.string_is_ascii(made))
    if pc.any(other).as_py():
        made = pc.replace_with_mask(made, other, pa.array(map(_line, texts.filter(other).to_pylist()), pa.string()))
    return pc.if_else(pc.equal(pc.binary_length(made), 0), None, made)


def _line(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.lower().split()))
