"""Every key that a training YAML may hold: its type, its default, its limits and what it does.

Unknown keys, wrong types and values out of range are refused with the key's place and the nearest known name. Keys that
a YAML leaves out have the defaults given here; all of them are saved with the run.
"""

# ruff: noqa: RUF009 (key() is dataclasses.field)

import json
import math
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml

import console


def key(
    default: Any,
    about: str,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    may_change: bool = False,
) -> Any:
    """A field of a settings class. `default` is ... for a key that must be given. `may_change`: --resume accepts
    another value, as it does not change the mathematics of the run."""
    metadata = {"about": about, "choices": choices, "low": low, "high": high, "may_change": may_change}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default_factory=lambda: default, metadata=metadata)


@dataclass(kw_only=True)
class Train:
    out: str = key(..., "folder of the run: checkpoints, metrics.jsonl, loss.png, config.yaml", may_change=True)
    seed: int = key(0, "decides the initial weights and the order of the data", low=0, high=(1 << 63) - 1)
    steps: int = key(..., "total optimizer steps, which the schedule spans", low=1, may_change=True)
    save_every: int = key(..., "steps between checkpoints; the last step is always saved", low=1, may_change=True)
    keep: int = key(2, "how many of the last checkpoints are kept", low=1, may_change=True)
    batch: int = key(32, "rows (sequences, conversations, pairs, replies) per step, over all processes", low=1)
    accumulate: int = key(
        1,
        "micro-batches per step over all processes, at least one each; more of them need less memory",
        low=1,
        may_change=True,
    )
    sequence: int = key(512, "longest row in tokens; longer rows are skipped", low=8)
    clip: float = key(1.0, "maximum gradient norm; a larger gradient is scaled down. 0: no clipping", low=0)
    device: str = key("auto", "auto: cuda, then mps, then cpu", ("auto", "cpu", "cuda", "mps"), may_change=True)
    dtype: str = key("float32", "bfloat16: autocast of the matrix products", ("float32", "bfloat16"))
    threads: int = key(0, "PyTorch's CPU threads; 0: PyTorch decides", low=0, high=1024, may_change=True)
    compile: bool = key(False, "torch.compile the model", may_change=True)
    kernels: str = key(
        "auto", "triton: fused operations; auto: on CUDA without compile", ("auto", "torch", "triton"), may_change=True
    )
    checkpoint_activations: bool = key(
        False, "recompute each block in the backward pass: less memory, slower", may_change=True
    )
    parallel: str = key(
        "none",
        "with torchrun: every process holds the whole model (ddp) or a shard of it (fsdp)",
        ("none", "ddp", "fsdp"),
        may_change=True,
    )
    router_aux_loss_coef: float | None = key(
        None, "mixture of experts: weight of the load-balancing loss; null: as in config.json", low=0
    )
    validate_every: int = key(0, "steps between validation losses; 0: only at the end", low=0, may_change=True)
    validate_batches: int = key(8, "batches of unseen rows in a validation", low=1, may_change=True)
    sample_every: int = key(0, "steps between printed samples; 0: none", low=0, may_change=True)
    sample_prompts: list[str] = key(
        (), "prompts of the samples: a question (sft) or the beginning of a text", may_change=True
    )
    wandb: str = key("off", "also log to Weights & Biases", ("off", "offline", "online"), may_change=True)


@dataclass(kw_only=True)
class Model:
    init: str | None = key(None, "checkpoint to start from (directory, hub id or .gguf); null: random weights")
    config: dict[str, Any] | None = key(
        None, "official config.json fields for random weights; vocab_size may be left out"
    )
    fingerprint: str | None = key(
        None, "lora, dpo, grpo with kl: hash of the starting weights; null: computed. Other weights are refused"
    )
    tokenizer: str = key(..., "directory or hub id with a tokenizer.json")


@dataclass(kw_only=True)
class Data:
    source: str = key(
        "corpus",
        "corpus: generated; shards: files of token ids; rows: JSON lines, JSON, Parquet or a data set of the hub with "
        "conversations, preferences or questions (data/conversations.py); auto: shards, else corpus",
        ("corpus", "shards", "rows", "auto"),
    )
    train: str | None = key(None, "shards, rows: glob pattern of the training files; rows: or the id of a hub data set")
    validation: str | None = key(None, "shards, rows: the same for validation; null: none", may_change=True)
    split: str = key("train", "rows: split of a hub data set")
    validation_split: str = key("test", "rows: the same for validation", may_change=True)
    subset: str | None = key(None, "rows: configuration of a hub data set")
    limit: int | None = key(None, "rows: how many to read, from the first on; null: all", low=1)
    skip_share: float = key(
        0.05,
        "rows: the run ends if more than this share of them can't be read; up to it (or one row) they are skipped and "
        "named. 0: none may be skipped",
        low=0,
        high=1,
        may_change=True,
    )
    fingerprint: str | None = key(None, "hash of the training data; null: computed. Other data is refused")
    turns: str = key("all", "sft on rows: which of the assistant's turns are learned", ("all", "last"))
    pack: bool = key(
        False, "pretrain, sft: pack rows of a step into one sequence, where none sees another: less padding"
    )
    tokens: int | None = key(
        None, "shards: tokens of the training files; null: counted. Another number is refused", low=1
    )
    corpus_tokenizer: str = key("models/tiny", "auto: used instead of model.tokenizer if there are no shards")
    seed: int = key(0, "corpus: seed of the generated examples", low=0)
    hard: float = key(0.5, "grpo on the corpus: share of questions harder than any that sft shows", low=0, high=1)
    outside: float = key(0.0, "grpo on the corpus: share of questions that should be declined", low=0, high=1)
    mask_documents: bool = key(False, "shards: tokens attend only within their own document, which needs a T x T mask")


@dataclass(kw_only=True)
class Lora:
    rank: int = key(
        0, "rank of the adapters, which are then all that is trained (training/lora.py); 0: no adapters", low=0
    )
    alpha: float = key(32.0, "an adapter's output is multiplied by alpha / rank", low=0)
    targets: list[str] = key(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "linear layers that get an adapter",
    )


@dataclass(kw_only=True)
class Dpo:
    beta: float = key(0.1, "how strongly the model is kept near the starting weights", low=0)
    nll: float = key(0.0, "weight of the chosen answers' own loss, which keeps them likely", low=0)


@dataclass(kw_only=True)
class Grpo:
    group: int = key(8, "replies to each question; train.batch, which counts replies, is a multiple", low=2)
    updates: int = key(1, "optimizer updates per step, all on the same replies", low=1)
    temperature: float = key(1.0, "sampling temperature of the replies", low=0.01, high=100)
    max_new_tokens: int = key(
        256, "longest reply in tokens; prompt and reply together are within train.sequence", low=1
    )
    rollout_batch: int = key(
        64, "replies generated at once, all of whose KV caches are in memory", low=1, may_change=True
    )
    thinking: bool = key(True, "rows: whether the replies think")
    format_reward: float = key(0.1, "reward for closed thinking and a finished answer; a right answer adds 1", low=0)
    divide_by_std: bool = key(
        True, "divide advantages by the group's standard deviation, as in the paper; Dr. GRPO: false"
    )
    average: str = key(
        "reply",
        "what a reply's losses are divided by: its length (the paper), all replies' (token: DAPO), or max_new_tokens "
        "(constant: Dr. GRPO)",
        ("reply", "token", "constant"),
    )
    clip: float = key(0.2, "how far below 1 the probability ratio is clipped", low=0, high=1)
    clip_high: float | None = key(None, "how far above 1; null: as clip. DAPO: 0.28", low=0)
    kl: float = key(0.04, "weight of the KL divergence from the starting weights, as in the paper; 0: none", low=0)


@dataclass(kw_only=True)
class Optimizer:
    name: str = key("muon", "muon: Muon for the hidden matrices, AdamW for the rest", ("muon", "adamw"))
    lr: float = key(..., "peak learning rate of AdamW, and of Muon, whose updates are scaled to AdamW's size", low=0)
    embedding_lr: float | None = key(None, "peak learning rate of embeddings, head and norms; null: lr", low=0)
    weight_decay: float = key(0.1, "weight decay of matrices and embeddings; norms have none", low=0)
    betas: list[float] = key(
        (0.9, 0.95), "AdamW's decay rates for the averages of gradients and of their squares", low=0, high=1
    )
    momentum: float = key(0.95, "Muon's momentum", low=0, high=1)


@dataclass(kw_only=True)
class Schedule:
    name: str = key("wsd", "wsd: warm-up, stable, linear decay; cosine: warm-up, half a cosine", ("wsd", "cosine"))
    warmup: float = key(0.02, "share of the steps in which the learning rate rises", low=0, high=1)
    decay: float = key(0.35, "wsd: share of the steps, at the end, in which it falls", low=0, high=1)
    final: float = key(0.0, "learning rate at the end, as a share of the peak", low=0, high=1)


@dataclass(kw_only=True)
class Settings:
    stage: str = key(
        ...,
        "the objective: next tokens of texts, answers of conversations, preferred answers, rewarded replies",
        ("pretrain", "sft", "dpo", "grpo"),
    )
    train: Train
    model: Model
    data: Data
    lora: Lora
    dpo: Dpo
    grpo: Grpo
    optimizer: Optimizer
    schedule: Schedule


def load(path: str | Path, overrides: list[str] = ()) -> Settings:
    """The settings of a YAML file with `--set a.b=c` overrides on top. A ValueError names the file or flag, and key."""
    given = _yaml(Path(path).read_bytes(), str(path))
    if not isinstance(given, dict):
        raise ValueError(f"{path}: holds no keys; see configs/toy.yaml for an example")
    for override in overrides:
        _override(given, override)
    return _build(Settings, given, "", str(path))


def resolved(settings: Settings) -> dict[str, Any]:
    """All keys with their values, as they are saved with the run."""
    return asdict(settings)


def as_yaml(settings: Settings) -> str:
    """All keys with their values, as `load` reads them."""
    return yaml.dump(resolved(settings), Dumper=_Dumper, sort_keys=False)


def may_change() -> set[str]:
    """The keys that --resume accepts with other values than the run began with."""
    sections = [section for section in fields(Settings) if is_dataclass(section.type)]
    return {
        f"{section.name}.{f.name}" for section in sections for f in fields(section.type) if f.metadata["may_change"]
    }


def table() -> str:
    """Every key by section: its type or allowed values, its default, and what it does."""
    lines = []
    for section in fields(Settings):
        if is_dataclass(section.type):
            lines.append(f"\n{section.name}")
        for f in fields(section.type) if is_dataclass(section.type) else [section]:
            name = f.name if f is section else f"  {section.name}.{f.name}"
            default = "required" if f.default_factory is MISSING else f"default {_yaml_value(f.default_factory())}"
            mark = "*" if f.metadata.get("may_change") else ""
            lines.append(f"{name}{mark} ({_allowed(f)}; {default}): {f.metadata['about']}")
    lines.append("\n* --resume accepts another value; every other key must keep the one that the run began with")
    return "\n".join(lines)


def _allowed(f) -> str:
    """`auto, cpu or cuda`, `a number from 0 to 1`, `a string`: what a key may be."""
    choices, low, high = (f.metadata[name] for name in ("choices", "low", "high"))
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    limits = "" if low is None else f" from {low}" + ("" if high is None else f" to {high}")
    return _type_name(f.type) + limits


def _yaml_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _yaml(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{origin}: not YAML ({error})") from None


class _Loader(yaml.SafeLoader):
    """Numbers and booleans of YAML 1.2: in 1.1, which PyYAML reads, 6e-3 is a text, 012 is 10, 1:30 is 90, and off is
    false. A key that is given twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else, as a hash like 12345678e1234567."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _override(given: dict, override: str) -> None:
    name, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: has no '='; write --set train.steps=100")
    *sections, last = name.split(".")
    kind = _kind_of(*sections, last)
    for section in sections:
        given = given.setdefault(section, {})
        if not isinstance(given, dict):
            raise ValueError(f"--set {override}: {section} is a value, not a section")
    # A text is taken as it stands: *.jsonl, @x or a #b mean something else in YAML.
    is_plain = kind in (str, str | None) and value not in ("", "~", "null") and value[0] not in "'\""
    given[last] = value if is_plain else _yaml(value, f"--set {name}")


def _kind_of(*names: str) -> Any:
    """The type of a key; None if there is no such key."""
    kind: Any = Settings
    for name in names:
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _build(cls: type, given: dict, place: str, origin: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    for name in given:
        if name not in known:
            near = console.did_you_mean(str(name), known).replace("mean ", f"mean {place}", 1)
            raise ValueError(f"{origin}: there is no key {place}{name}{near or '; train.py --keys lists them'}")
    hints = get_type_hints(cls)
    values = {}
    for name, f in known.items():
        where = place + name
        if is_dataclass(hints[name]):
            section = {} if given.get(name) is None else given[name]
            if not isinstance(section, dict):
                raise ValueError(f"{origin}: {where} is {section!r}, not a section of keys")
            values[name] = _build(hints[name], section, where + ".", origin)
        elif name in given:
            values[name] = _value(given[name], hints[name], f, where, origin)
        elif f.default_factory is MISSING:
            raise ValueError(f"{origin}: {where} must be given: {f.metadata['about']}")
    return cls(**values)


def _value(value: Any, kind: Any, f, where: str, origin: str) -> Any:
    if kind in (float, float | None) and type(value) is int:
        value = float(value)
    if kind == list[float] and isinstance(value, list):
        value = [float(item) if type(item) is int else item for item in value]
    if not _fits(value, kind):
        raise ValueError(f"{origin}: {where} is {value!r}, but must be {_type_name(kind)}: {f.metadata['about']}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{origin}: {where} is empty: {f.metadata['about']}")
    choices, low, high = (f.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        near = console.did_you_mean(str(value), choices)
        raise ValueError(f"{origin}: {where} is {value!r}, not one of {', '.join(choices)}{near}")
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    highest = math.inf if high is None else high
    if low is not None and not all(low <= number <= highest and math.isfinite(number) for number in numbers):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{origin}: {where} is {value!r}, but must be {limits}: {f.metadata['about']}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return type(value) is kind


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return "a list"
    return names.get(kind, "a section")
