"""A low-rank adapter (LoRA) as PEFT saves it: adapter_config.json and adapter_model.safetensors, without its base.

https://huggingface.co/docs/peft/developer_guides/checkpoint. This file reads the config and finds the base;
formats/merge.py adds the adapter to it. Needs no PyTorch.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from formats.hub import ADAPTER_FILES
from formats.json_file import read_json

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX = "base_model.model."  # before the official name of each module

# Settings whose adapters cannot be merged into the weights as a sum.
UNMERGEABLE = ("fan_in_fan_out", "layer_replication", "target_parameters", "alora_invocation_tokens", "lora_bias")
UNMERGEABLE += ("trainable_token_indices", "use_qalora", "use_bdlora", "velora_config", "monteclora_config")
PLAIN_START = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga")
# Of the regular expressions in alpha_pattern, those that can't run for long.
SAFE_PATTERN = re.compile(r"(?:[\w-]|\\?\.(?![*+?])|\.\*|\\d\+?|\[[\w-]+\]|[|^$()])*")


class AdapterConfig:
    """What adapter_config.json in a directory says. ValueError names what can't be merged."""

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / CONFIG
        if not self.path.is_file():
            whole = "; a whole model is given as --model" if (directory / "config.json").is_file() else ""
            raise ValueError(f"{directory}: not an adapter, which has an {CONFIG}{whole}")
        self._fields = read_json(self.path)
        kind = self._fields.get("peft_type")
        if kind != "LORA":
            self._fail(f"peft_type is {str(kind)[:40]!r}; only LORA is merged here")
        for name in UNMERGEABLE:
            if self._fields.get(name):
                self._fail(f"{name} is {str(self._fields[name])[:40]}, which is not merged here")
        if (start := self._fields.get("init_lora_weights", True)) not in PLAIN_START:
            self._fail(
                f"init_lora_weights is {str(start)[:40]!r}, which changed the base's weights; convert it in PEFT"
            )
        self._alphas = self._fields.get("alpha_pattern") or {}
        if not isinstance(self._alphas, dict):
            self._fail("alpha_pattern is not an object {...}")
        for pattern in self._alphas:
            if len(pattern) > 200 or pattern.count("*") > 4 or not SAFE_PATTERN.fullmatch(pattern):
                self._fail(f"alpha_pattern has the expression {pattern[:60]!r}, which is not read here")
        for alpha in (self._fields.get("lora_alpha", 8), *self._alphas.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                self._fail(f"lora_alpha is {str(alpha)[:40]!r}, not a number")

    @property
    def rank(self) -> int | None:
        """The rank of every module, None where modules have ranks of their own or nothing is said."""
        return None if self._fields.get("rank_pattern") else self._fields.get("r")

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {problem}")

    def scale(self, module: str, rank: int) -> float:
        """What the product of the two matrices of a module (its official name) is multiplied by."""
        alpha = self._fields.get("lora_alpha", 8)
        for pattern, own in self._alphas.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error:
                self._fail(f"alpha_pattern has {pattern[:60]!r}, which is not a regular expression")
            if found:
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self._fields.get("use_rslora") else rank)

    def base(self) -> Path:
        """The local path of the model that the adapter belongs to, which may be downloaded."""
        from formats.source import resolve

        fix = "give the base as --model BASE --adapter DIR"
        name, revision = self._fields.get("base_model_name_or_path"), self._fields.get("revision")
        if not isinstance(name, str) or not name:
            self._fail(f"no base_model_name_or_path; {fix}")
        beside = self.directory / name
        if beside.is_dir() or beside.is_file():
            name = str(beside)
        elif isinstance(revision, str) and revision and not Path(name).exists():
            name = f"{name}@{revision}"
        try:
            path = resolve(name, f"{self.path}: base_model_name_or_path")
        except ValueError as error:
            raise type(error)(f"{error}; or {fix}") from None
        if is_adapter(path):
            self._fail(f"its base {name} is an adapter itself; merge that one first (convert.py)")
        return path


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no full model."""
    return (path / CONFIG).is_file() and not any(path.glob("model*.safetensors*"))


def text_path(path: Path, adapter: Path | None = None) -> Path:
    """Where the tokenizer and template of a checkpoint are: with its adapter if saved there (it may have more tokens),
    else with the base."""
    if adapter is not None and (adapter / "tokenizer.json").is_file():
        return adapter
    if is_adapter(path) and not (path / "tokenizer.json").is_file():
        return AdapterConfig(path).base()
    return path


class StoredName(NamedTuple):
    """What a stored name is of: an official module, a part of it (`lora_A`, `lora_embedding_B`, …, `weight`), and
    the adapter's own name, where it was left in (`q_proj.lora_A.NAME.weight`)."""

    module: str
    part: str
    adapter: str | None


def parse_name(stored: str) -> StoredName:
    name = re.sub(r"\.(?:base_layer|original_module)(?=\.)", "", stored.removeprefix(PREFIX))
    if match := re.fullmatch(r"(.+)\.(lora_\w+)(?:\.(?!weight$)([^.]+))?(?:\.weight)?", name):
        return StoredName(*match.groups())
    if match := re.fullmatch(r"(.+)\.modules_to_save(?:\.([^.]+))?\.(\w+)", name):
        return StoredName(match[1], match[3], match[2])
    module, _, leaf = name.rpartition(".")
    return StoredName(module, leaf, None)
