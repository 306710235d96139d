"""What a file is that is not what its name says, told by its first bytes: a pointer, a web page, another container; and
what a folder without safetensors holds instead, told by its names."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"# xet version",
    b"/annex/objects/",
)


CONTAINERS = {  # how a file begins: what it is, and what to do
    b"GGUF": "a GGUF by its first bytes; give it a name that ends in .gguf",
    b"\x1f\x8b": "compressed by gzip; unpack it (gunzip)",
    b"(\xb5/\xfd": "compressed by zstd; unpack it (zstd -d)",
    b"\xfd7zXZ": "compressed by xz; unpack it (unxz)",
    b"BZh": "compressed by bzip2; unpack it (bunzip2)",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"\x89HDF": "HDF5 (TensorFlow, Keras); get the safetensors version",
    b"\x00\x05\x16\x07": "what macOS writes beside a file (AppleDouble), not the file; take the one without ._",
}
# Names in a folder: what they are of, and what to do. Of several the first counts.
OTHER_WEIGHTS = {
    "*.incomplete *.part *.partial *.crdownload *.download *.aria2": "an unfinished download; finish it",
    "*.npz": "MLX's form in NumPy arrays; get the safetensors version",
    "*.distcp": "a shard of FSDP; join them (accelerate merge-weights)",
    "zero_to_fp32.py": "DeepSpeed's, beside its sharded state; run it (python zero_to_fp32.py . .)",
    "*.onnx": "ONNX, which needs onnxruntime; get the safetensors version",
    "openvino_model*": "OpenVINO's; get the safetensors version",
    "*.h5 *.msgpack": "TensorFlow's or Flax's; get the safetensors version",
}


def other_weights(names: Iterable[str]) -> str | None:
    """The first of the names that is known not to be safetensors, what it is, and what to do."""
    names = sorted(names)
    for patterns, what in OTHER_WEIGHTS.items():
        found = next((name for name in names if any(fnmatchcase(name, one) for one in patterns.split())), None)
        if found:
            return f"only {found}, which is {what}"
    return None


def foreign(start: bytes) -> str | None:
    """What a file that begins so is, and what to do, where no file of weights, JSON or rows does; None elsewhere."""
    if not start.strip(b"\0"):
        return f"{'all zeros' if start else 'empty'}, so its download did not finish; download it again"
    if start.startswith(POINTERS):
        return "a pointer (Git LFS, Xet, git-annex), not the file itself; run `git lfs pull` in its folder"
    if start.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file (as a link to the page of a file gives); download the file itself"
    for magic, what in CONTAINERS.items():
        if start.startswith(magic):
            return what
    return None


def mistaken(start: bytes, is_json: bool = False) -> str | None:
    """What a file that can't be read and begins so is, and what to do; None where nothing is known but that it is
    damaged. `is_json`: a text that begins like JSON is nothing else."""
    if what := foreign(start):
        return what
    if start[8:9] == b"{" and not any(start[5:8]):
        return "a safetensors file by its first bytes; call it model.safetensors, in a folder with its config.json"
    text = start.decode("utf-8", "ignore")  # the end may be half a character
    is_text = len(text.encode()) > max(7, len(start) - 4) and all(
        letter.isprintable() or letter.isspace() for letter in text
    )
    if is_text and not (is_json and text.lstrip("\ufeff \t\r\n").startswith(("{", "["))):
        return f"a text ({' '.join(text.split())[:40]!r}), perhaps a server's message, not the file; download it again"
    return None
