"""Which .safetensors files of a folder are the weights of its model, judged by their names."""

import re
from collections.abc import Iterable
from pathlib import PurePath

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# STEM-00001-of-00003.safetensors: transformers' name of a shard, with or without an index beside it.
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
NOT_MODELS = {"adapter_model.safetensors", "trainer.safetensors", "optimizer.safetensors"}


def weight_files(names: Iterable[str]) -> list[str]:
    """The files of a model without an index, in order: model.safetensors, else all shards of the one model that there
    is, else the only .safetensors file. Empty where there is none.

    ValueError names the shards that are missing, or the models where there are several.
    """
    stored = (name for name in names if PurePath(name).suffix.lower() == ".safetensors" and name not in NOT_MODELS)
    names = {name for name in stored if not name.startswith(".")}  # macOS writes ._NAME beside a file
    if SINGLE in names:
        return [SINGLE]
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        match = SHARD.fullmatch(name)
        model = f"{match['stem']}-*-of-{match['count']}.safetensors" if match else name
        models.setdefault(model, []).append(name)
    official = {model: found for model, found in models.items() if model.startswith("model-")}
    models = official or models
    if len(models) > 1:
        listed = ", ".join(list(models)[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
        raise ValueError(f"{len(models)} models in it ({listed}); keep one, or give it a folder of its own")
    if not models:
        return []
    (found,) = models.values()
    if match := SHARD.fullmatch(found[0]):
        count = int(match["count"])
        wanted = (f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
        missing = [name for name in wanted if name not in names]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(f"of {count} shards {', '.join(missing[:4])}{more} is missing; download it again")
    return found
