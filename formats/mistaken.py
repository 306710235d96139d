"""What a file is that is not what its name says, told by its first bytes: a pointer, a web page, another container."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"# xet version",
    b"/annex/objects/",
)


def mistaken(start: bytes) -> str | None:
    """What a file that begins so is, and what to do; None where nothing is known but that it is damaged."""
    if start.startswith(POINTERS):
        return "a pointer (Git LFS, Xet, git-annex), not the file itself; run `git lfs pull` in its folder"
    if start.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file (as a link to the page of a file gives); download the file itself"
    if start.startswith(b"GGUF"):
        return "a GGUF by its first bytes; give it a name that ends in .gguf"
    if start.startswith(b"\x1f\x8b"):
        return "compressed by gzip; unpack it (gunzip)"
    if start.startswith(b"(\xb5/\xfd"):
        return "compressed by zstd; unpack it (zstd -d)"
    if start[8:9] == b"{" and not any(start[5:8]):
        return "a safetensors file by its first bytes; call it model.safetensors, in a folder with its config.json"
    return None
