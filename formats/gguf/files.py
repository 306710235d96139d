"""Which .gguf of a folder or repository is meant: the only model in it, or the one that a tag names (`Q4_K_M`)."""

import re
from collections.abc import Iterable

# NAME-00001-of-00003.gguf, as llama-gguf-split names the parts of a model.
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1000
NOT_MODELS = re.compile(r"(?:^|[/.-])(?:mmproj|imatrix)", re.IGNORECASE)  # beside them: image encoders, statistics


def part_names(name: str) -> list[str]:
    """All files of a split model from the name of any one; a whole file is its only part."""
    match = PART.fullmatch(name)
    count = int(match["count"]) if match else 1
    if not 2 <= count <= MAX_PARTS:
        return [name]
    return [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def choose(names: Iterable[str], tag: str | None) -> list[str]:
    """The files of one model among `names` (paths with /), in the order of its parts.

    `tag` is a quantisation as spelled in the file's name, a file's name, or None where there is only one model.
    ValueError names the models that there are.
    """
    models = sorted({part_names(name)[0] for name in names if name.endswith(".gguf") and not NOT_MODELS.search(name)})
    fitting = [name for name in models if tag is None or _is_called(name, tag)]
    if len(fitting) == 1:
        return part_names(fitting[0])
    listed = ", ".join((fitting or models)[:8]) + (f" and {len(models) - 8} more" if len(fitting or models) > 8 else "")
    if not fitting:
        raise ValueError(f"no .gguf file is called {tag}; there are {listed or 'none'}")
    fix = "add which one you want, as :Q4_K_M" if tag is None else "write more of its name after the colon"
    raise ValueError(f"{len(fitting)} models in .gguf files ({listed}); {fix}")


def _is_called(name: str, tag: str) -> bool:
    match = PART.fullmatch(name)
    label = match["stem"] if match else name.removesuffix(".gguf")
    names = (name, name.rpartition("/")[2], label, label.rpartition("/")[2])
    if tag.lower() in (one.lower() for one in names):
        return True
    return re.search(rf"(?:^|[-./]){re.escape(tag)}(?=$|[-./])", label, re.IGNORECASE) is not None
