"""What a pickle imports, found without running it.

A pickle is a program for a stack machine (https://docs.python.org/3/library/pickletools.html). What it can do is what
it imports, so its opcodes are walked with a stack that holds the texts it pushes, and each import is held against a
list of names that only build data. A name that the pickle computes first is a finding by itself. The walk keeps to a
number of opcodes and reads no long argument into memory. Python executes a pickle as it reads it, so one that breaks
off later has run until there: its imports count too.
"""

import pickletools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from inspection.findings import Ledger, Unexamined

MAX_OPCODES = 3_000_000  # of all pickles of a repository
MAX_TEXT = 1 << 12  # bytes of an argument that is kept; longer ones are skipped
MAX_LINE = 1 << 20
MAX_PICKLES = 64  # one after the other; PyTorch's old format has five


def _names(text: str) -> frozenset[str]:
    """The words of a list that is written out over several lines."""
    return frozenset(text.split())


OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
LENGTHS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
LENGTHS |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
UNKNOWN = object()  # something on the stack that is no text
MARK = object()

TORCH = """
Size device dtype Tensor float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128
float8_e4m3fn float8_e5m2 DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage
ShortStorage CharStorage ByteStorage BoolStorage ComplexFloatStorage ComplexDoubleStorage QInt8Storage
QUInt8Storage QInt32Storage per_tensor_affine per_channel_affine strided sparse_coo contiguous_format channels_last
preserve_format
"""
BUILTINS = "set frozenset list dict tuple int float complex bool str bytes bytearray slice range object"
HARMLESS = {
    "torch": TORCH,
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
    "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor _rebuild_meta_tensor_no_storage "
    "_rebuild_device_tensor_from_numpy",
    "torch.storage": "UntypedStorage TypedStorage",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict defaultdict Counter deque",
    "builtins": BUILTINS,
    "__builtin__": BUILTINS + " unicode long",
    "numpy": "ndarray dtype bool_ int64 int32 int16 int8 uint8 uint16 uint32 uint64 float16 float32 float64",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.dtypes": "Float64DType Float32DType Float16DType Int64DType Int32DType Int16DType Int8DType UInt8DType "
    "BoolDType",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "argparse": "Namespace",
    "joblib.numpy_pickle": "NumpyArrayWrapper",
}
HARMLESS = {(module, name) for module, names in HARMLESS.items() for name in names.split()}

# Modules of which any name is as good as a shell, directly or through what it can be made to call.
DANGEROUS = _names(
    """
    os posix nt subprocess sys builtins __builtin__ importlib runpy pty socket ssl shutil ctypes _ctypes pickle _pickle
    dill cloudpickle joblib marshal types code codeop commands webbrowser platform asyncio multiprocessing threading
    _thread urllib http httplib httpx requests ftplib telnetlib smtplib xmlrpc aiohttp paramiko signal pdb bdb profile
    cProfile timeit trace doctest pydoc pkgutil zipimport imp site venv ensurepip pip setuptools distutils operator
    functools itertools inspect gc ast eval exec io tempfile glob fileinput linecache logging sqlite3 uu base64 zipfile
    tarfile idlelib lib2to3 tkinter turtle nturl2path mimetypes cgitb crypt bz2 lzma gzip test numpy.testing torch.hub
    torch.jit torch.utils torch._dynamo torch._inductor torch.serialization torch.fx transformers.dynamic_module_utils
    """
)

ARRAYS = ("joblib.numpy_pickle", "NumpyArrayWrapper")  # joblib writes an array's bytes into the pickle, behind this one
MAX_SEARCHED = 64 << 20
# GLOBAL, and two short texts (each may be memoized) with STACK_GLOBAL
IMPORT = re.compile(
    rb"c([A-Za-z_][\w.]{0,100})\n([A-Za-z_][\w.]{0,100})\n"
    rb"|\x8c[\x01-\x64]([A-Za-z_][\w.]{0,99})\x94?\x8c[\x01-\x64]([A-Za-z_][\w.]{0,99})\x94?\x93"
)


class _Stack(list):
    """The machine's stack. Popping from nothing gives what is unknown: a broken pickle is not our concern."""

    def take(self) -> Any:
        return self.pop() if self else UNKNOWN

    def to_mark(self) -> None:
        while self and self.pop() is not MARK:
            pass


def imports(stream: BinaryIO, ledger: Ledger) -> Iterator[tuple[str, str] | None]:
    """(module, name) of each import of the pickle that begins here, None for one whose name is computed.

    Ends behind STOP. Raises `Unexamined` where the bytes are no (whole) pickle, or too many.
    """
    stack, memo = _Stack(), {}
    while ledger.opcodes < MAX_OPCODES:
        ledger.opcodes += 1
        code = stream.read(1)
        if not code:
            raise Unexamined("truncated", "the pickle ends without its end mark")
        if code[0] not in OPCODES:
            raise Unexamined("truncated", f"byte {code[0]:#x} is no opcode of a pickle")
        opcode = OPCODES[code[0]]
        argument = _argument(opcode, stream)
        name = opcode.name
        if name == "STOP":
            return
        if name in ("GLOBAL", "INST"):
            module, _, attribute = (argument or "").partition(" ")
            yield (module, attribute) if argument is not None else None
        elif name == "STACK_GLOBAL":
            attribute, module = stack.take(), stack.take()
            yield (module, attribute) if isinstance(module, str) and isinstance(attribute, str) else None
        elif name.startswith("EXT"):
            yield None
        _apply(opcode, argument, stack, memo)
    raise Unexamined("too-large", f"the pickles have more than {MAX_OPCODES:,} opcodes")


def _apply(opcode: pickletools.OpcodeInfo, argument: Any, stack: _Stack, memo: dict[Any, Any]) -> None:
    """What an opcode does to the stack, as far as texts go."""
    name = opcode.name
    if name in TEXTS:
        stack.append(argument if isinstance(argument, str) else UNKNOWN)
    elif name == "MARK":
        stack.append(MARK)
    elif name == "DUP":
        stack.append(stack[-1] if stack else UNKNOWN)
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1] if stack else UNKNOWN
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1] if stack else UNKNOWN
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo.get(argument, UNKNOWN))
    elif name == "POP":
        stack.take()
    elif name == "STACK_GLOBAL":
        stack.append(UNKNOWN)
    else:
        if pickletools.markobject in opcode.stack_before:
            stack.to_mark()
            before = opcode.stack_before[: opcode.stack_before.index(pickletools.markobject)]
        else:
            before = opcode.stack_before
        for _ in before:
            stack.take()
        stack.extend([UNKNOWN] * len(opcode.stack_after))


def _argument(opcode: pickletools.OpcodeInfo, stream: BinaryIO) -> Any:
    """The argument as text or number; None for one that is long or of no interest."""
    kind = opcode.arg
    if kind is None:
        return None
    if kind.n == pickletools.UP_TO_NEWLINE:
        lines = 2 if kind.name == "stringnl_noescape_pair" else 1
        parts = [stream.readline(MAX_LINE) for _ in range(lines)]
        if not all(part.endswith(b"\n") for part in parts):
            raise Unexamined("truncated", "an argument of the pickle does not end")
        text = " ".join(part[:-1].decode("utf-8", "backslashreplace") for part in parts)
        if opcode.name in ("GET", "PUT"):
            return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text
        if opcode.name == "STRING":
            text = text.strip()[1:-1]
        if opcode.name in ("STRING", "UNICODE") and "\\" in text:
            return None  # escapes could spell any name: unknown
        return text if len(text) <= MAX_TEXT else None
    if kind.n in LENGTHS:
        width = LENGTHS[kind.n]
        length = int.from_bytes(_exactly(stream, width), "little", signed=kind.n == pickletools.TAKEN_FROM_ARGUMENT4)
        if length < 0:
            raise Unexamined("truncated", "an argument of the pickle has a negative length")
        if length > MAX_TEXT:
            _skip(stream, length)
            return None
        return _exactly(stream, length).decode("utf-8", "backslashreplace")
    return int.from_bytes(_exactly(stream, kind.n), "little")


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Unexamined("truncated", "the pickle ends inside an argument")
    return data


def _skip(stream: BinaryIO, size: int) -> None:
    while size:
        piece = stream.read(min(size, 1 << 20))
        if not piece:
            raise Unexamined("truncated", "the pickle ends inside an argument")
        size -= len(piece)


def is_text_pickle(data: bytes) -> bool:
    """Whether bytes without a magic number are a whole pickle of protocol 0 or 1 that imports something."""
    import io

    if data[:1] not in (
        b"c",
        b"(",
        b"i",
        b"]",
        b"}",
        b")",
        b"I",
        b"S",
        b"V",
        b"N",
        b"K",
        b"X",
        b"U",
        b"l",
        b"d",
        b"t",
        b"\x8c",
    ):
        return False
    found = 0
    try:
        for one in imports(io.BytesIO(data), Ledger()):
            found += one is None or (one[0].replace(".", "").replace("_", "").isalnum() and " " not in one[1])
    except Unexamined:
        return found > 0 and _looks_like_import(data)
    return found > 0


def _looks_like_import(data: bytes) -> bool:
    """A pickle that was cut off: its first import is two short lines of names."""
    lines = data[1:200].split(b"\n")[:2]
    return (
        data[:1] == b"c"
        and len(lines) == 2
        and all(line.replace(b".", b"").replace(b"_", b"").isalnum() for line in lines)
    )


def examine(ledger: Ledger, where: str, stream: BinaryIO, several: bool = False) -> None:
    """Writes down what the pickle at the stream's place imports; with `several`, of all pickles that follow as well."""
    harmless, problem, count = set(), None, 0
    try:
        while count < MAX_PICKLES:
            for found in imports(stream, ledger):
                _judge(ledger, where, found, harmless)
            count += 1
            if not several or stream.peek(1)[:1] != b"\x80":
                break
    except Unexamined as error:
        problem = error if count == 0 else None  # what follows the pickles of a legacy checkpoint are its numbers
        if ARRAYS in harmless:
            problem = Unexamined("truncated", "the numbers of an array stand inside it; what follows was only searched")
            for found in _searched(stream.read(MAX_SEARCHED)):
                if _is_dangerous(*found):
                    _judge(ledger, where, found, harmless)
    is_accused = any(finding.file == where and finding.id != "pickle" for finding in ledger.findings)
    if not is_accused and (harmless or problem is None):
        names = ", ".join(sorted(f"{module}.{name}" for module, name in harmless)) or "nothing"
        ledger.find("pickle", where, f"imports {names}")
    if problem:
        raise problem


def _searched(data: bytes) -> Iterator[tuple[str, str]]:
    """(module, name) of what looks like an import in bytes that can't be read opcode by opcode."""
    for match in IMPORT.finditer(data):
        module, name = (part.decode("utf-8", "replace") for part in match.groups() if part is not None)
        yield module, name


def _is_dangerous(module: str, name: str) -> bool:
    parts = module.split(".")
    dangerous = any(".".join(parts[:at]) in DANGEROUS for at in range(1, len(parts) + 1))
    return dangerous or (parts[0] in ("numpy", "torch", "collections") and "." in name) or not module.strip()


def _judge(ledger: Ledger, where: str, found: tuple[str, str] | None, harmless: set[tuple[str, str]]) -> None:
    if found is None:
        ledger.find("pickle-hidden-import", where, "imports a name that is computed while it is loaded")
    elif found in HARMLESS:
        harmless.add(found)
    else:
        id = "pickle-import" if _is_dangerous(*found) else "pickle-unlisted"
        ledger.find(id, where, f"imports {'.'.join(found)}"[:200])
