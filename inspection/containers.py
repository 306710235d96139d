"""Archives and compressed files: their members are examined like files, within limits on number, depth and size.

Nothing is unpacked onto the disk. Small members are examined in memory, large ones by their beginning, and the bytes
that come out of all archives of a repository together are bounded, so that a decompression bomb is harmless.
"""

import bz2
import gzip
import io
import lzma
import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from inspection import pickles
from inspection.findings import Ledger, Unexamined

MAX_MEMBERS = 20_000
MAX_DEPTH = 4
MEMBER = 64 << 20  # bytes of a member that is examined in memory
TOTAL = 256 << 20  # bytes out of all archives of a repository
BOMB = 200  # times the compressed size, for more than BOMB_BYTES
BOMB_BYTES = 32 << 20

Examine = Callable[[Ledger, str, BinaryIO, int, int], tuple[str, str]]  # ledger, where, stream, size, depth
NPY_HEADER = re.compile(
    r"\{'descr': (?P<type>'[^']{1,40}'|\[.*\]), 'fortran_order': (?:True|False), 'shape': \((?P<shape>[\d, ]*)\), \}\s*"
)
LEGACY_TAR = {"sys_info", "pickle", "storages", "tensors"}


def _spend(ledger: Ledger, where: str, size: int, packed: int) -> None:
    """Accounts for unpacked bytes."""
    if size > BOMB_BYTES and size > BOMB * max(1, packed):
        ledger.find("archive-bomb", where, f"{packed:,} bytes unpack into {size:,} or more")
        raise Unexamined("too-large", "unpacks into too many bytes")
    ledger.unpacked += size
    if ledger.unpacked > TOTAL:
        raise Unexamined("too-large", f"the archives unpack into more than {TOTAL:,} bytes")


def _member(ledger: Ledger, where: str, stream: BinaryIO, size: int, depth: int, examine: Examine) -> None:
    """One member, in memory."""
    ledger.members += 1
    if ledger.members > MAX_MEMBERS:
        raise Unexamined("too-large", f"more than {MAX_MEMBERS:,} members in archives")
    if size > MEMBER:
        raise Unexamined("too-large", f"{where} has {size:,} bytes; members of up to {MEMBER:,} are examined")
    data = stream.read(size + 1)
    if len(data) != size:
        raise Unexamined("truncated", f"{where} does not have the {size:,} bytes that its archive states")
    examine(ledger, where, io.BytesIO(data), size, depth + 1)


def _check_depth(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise Unexamined("too-large", f"archives nested more than {MAX_DEPTH} deep")


def _check_path(ledger: Ledger, where: str, name: str) -> None:
    parts = re.split(r"[/\\]", name)
    if name[:1] in ("/", "\\") or ".." in parts or re.match(r"[A-Za-z]:", name):
        ledger.find("archive-path", where, f"has a member {name[:100]!r}")


class _Later:
    """The first member that could not be examined; the others are still examined."""

    def __init__(self):
        self.error: Unexamined | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, Unexamined):
            self.error = self.error or error
            return error.id != "too-large" or "bytes; members" in error.what
        if isinstance(
            error, RuntimeError | OSError | EOFError | ValueError | zlib.error | lzma.LZMAError | NotImplementedError
        ):
            self.error = self.error or Unexamined("unreadable", f"a member cannot be unpacked ({str(error)[:100]})")
            return True
        return False


def examine_zip(
    ledger: Ledger, where: str, stream: BinaryIO, size: int, depth: int, examine: Examine
) -> tuple[str, str]:
    """A zip: PyTorch's files and numpy's .npz are ones too."""
    _check_depth(depth)
    try:
        archive = zipfile.ZipFile(stream)
        infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise Unexamined("truncated", f"not a whole zip ({str(error)[:80]})") from None
    if len(infos) > MAX_MEMBERS:
        raise Unexamined("too-large", f"a zip of {len(infos):,} members")
    names = [info.filename for info in infos]
    roots = {name.partition("/")[0] for name in names}
    is_torch = any(name.endswith("/data.pkl") or name == "data.pkl" for name in names)
    later = _Later()
    for info in infos:
        _check_path(ledger, where, info.filename)
        if info.is_dir():
            continue
        with later:
            if info.flag_bits & 1:
                raise Unexamined("encrypted", f"the member {info.filename[:80]} is encrypted")
            inner = f"{where}/{info.filename[:200]}"
            if is_torch and re.fullmatch(
                r"([^/]+/)?(data/\d+|version|byteorder|\.data/serialization_id|\.format_version|\.storage_alignment)",
                info.filename,
            ):
                continue  # numbers of a tensor, which torch only copies
            if info.file_size > MEMBER and info.filename.endswith((".npy", ".safetensors")):
                with archive.open(info) as member:
                    head = _Head(member, info.file_size)
                    examine(ledger, inner, head, info.file_size, depth + 1)
                continue
            _spend(ledger, inner, info.file_size, info.compress_size)
            with archive.open(info) as member:
                _member(ledger, inner, member, info.file_size, depth, examine)
    kind = "pytorch zip" if is_torch else "npz" if names and all(name.endswith(".npy") for name in names) else "zip"
    if is_torch and any(re.fullmatch(r"[^/]+/(code/.+|constants\.pkl)", name) for name in names) and len(roots) == 1:
        if any("/code/" in name for name in names):
            ledger.find("native-code", where, "a TorchScript archive: its code/ runs when it is loaded")
        kind = "torchscript"
    if kind == "zip":
        ledger.find("archive", where, f"a zip of {len(infos):,} members")
    if later.error:
        raise later.error
    return kind, "code" if kind in ("pytorch zip", "torchscript") else "data" if kind == "npz" else "unknown"


class _Head(io.BytesIO):
    """The first bytes of a member that is too large for memory."""

    def __init__(self, member: BinaryIO, size: int):
        super().__init__(member.read(1 << 20))
        self.whole = size


def examine_tar(
    ledger: Ledger, where: str, stream: BinaryIO, size: int, depth: int, examine: Examine
) -> tuple[str, str]:
    """A tar; PyTorch's oldest format is one."""
    _check_depth(depth)
    later, count, names = _Later(), 0, set()
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 (closed with the stream)
        for info in archive:
            count += 1
            if count > MAX_MEMBERS:
                raise Unexamined("too-large", f"a tar of more than {MAX_MEMBERS:,} members")
            names.add(info.name)
            _check_path(ledger, where, info.name)
            inner = f"{where}/{info.name[:200]}"
            if info.issym() or info.islnk():
                target = info.linkname
                if target.startswith("/") or ".." in target.split("/"):
                    ledger.find("archive-path", where, f"has a link {info.name[:80]!r} to {target[:80]!r}")
                continue
            if not info.isfile():
                if not info.isdir():
                    ledger.find("archive-path", where, f"has a member {info.name[:80]!r} that is not a regular file")
                continue
            if info.sparse is not None or info.size > size:
                raise Unexamined("too-large", f"{inner} states {info.size:,} bytes, more than the archive has")
            with later:
                _spend(ledger, inner, info.size, info.size)
                _member(ledger, inner, archive.extractfile(info), info.size, depth, examine)
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise Unexamined("truncated", f"not a whole tar ({str(error)[:80]})") from None
    if later.error:
        raise later.error
    if names >= LEGACY_TAR:
        return "pytorch tar", "code"
    ledger.find("archive", where, f"a tar of {count:,} members")
    return "tar", "unknown"


OPENERS = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}


def examine_compressed(
    ledger: Ledger, where: str, stream: BinaryIO, size: int, depth: int, examine: Examine, kind: str
) -> tuple[str, str]:
    """gzip, bzip2, xz or zlib: one member."""
    _check_depth(depth)
    data = bytearray()
    try:
        for piece in _zlib(stream) if kind == "zlib" else _pieces(OPENERS[kind](stream)):
            data += piece
            if len(data) > MEMBER:
                break
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        if not data:
            raise Unexamined("truncated", f"not a whole {kind} file ({str(error)[:80]})") from None
        ledger.find("truncated", where, f"the {kind} stream breaks off ({str(error)[:80]})")
        examine(ledger, f"{where}/content", io.BytesIO(bytes(data)), len(data), depth + 1)
        raise Unexamined("truncated", f"the {kind} stream breaks off") from None
    _spend(ledger, where, len(data), size)
    if len(data) > MEMBER:
        raise Unexamined("too-large", f"unpacks into more than {MEMBER:,} bytes")
    ledger.members += 1
    inner = re.sub(r"\.(gz|bz2|xz|z|tgz)$", "", where.rpartition("/")[2], flags=re.IGNORECASE)
    format, tier = examine(ledger, f"{where}/{inner}", io.BytesIO(bytes(data)), len(data), depth + 1)
    return f"{kind} of {format}", tier


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(1 << 20):
        yield piece


def _zlib(stream: BinaryIO) -> Iterator[bytes]:
    engine = zlib.decompressobj()
    while (piece := engine.unconsumed_tail or stream.read(1 << 16)) and not engine.eof:
        if unpacked := engine.decompress(piece, 1 << 20):
            yield unpacked


def examine_npy(ledger: Ledger, where: str, stream: BinaryIO, size: int) -> tuple[str, str]:
    """numpy's .npy: numbers, or a pickle where the header says that the elements are objects."""
    head = stream.read(8)
    width = 2 if head[6:7] == b"\x01" else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > 1 << 16 or 8 + width + length > size:
        raise Unexamined("truncated", f"a header of {length:,} bytes in a file of {size:,}")
    header = stream.read(length).decode("latin-1")
    match = NPY_HEADER.fullmatch(header)
    if match is None:
        raise Unexamined("truncated", "not the header that numpy writes")
    if re.search(r"(^|, )'[<>=|]?O\d*'", match["type"]):
        pickles.examine(ledger, where, io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream)
        return "npy of objects", "code"
    simple = re.fullmatch(r"'[<>|=]?([a-zA-Z?])(\d+)(\[\w+\])?'", match["type"])
    if simple and simple[1] in "biufcSVmM":
        count = math.prod(int(number) for number in match["shape"].replace(" ", "").split(",") if number[:15])
        needed = count * int(simple[2]) + 8 + width + length
        if needed > size:
            raise Unexamined("truncated", f"{needed:,} bytes are stated, {size:,} are there")
        if needed < size:
            ledger.find("weights-trailing-bytes", where, f"{size - needed:,} bytes follow the array")
    return "npy", "data"
