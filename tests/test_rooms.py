"""Who may import whom. The table below is the plan of the house in README.md; a new arrow is a decision, made here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room: (other rooms it may import, packages it may import). `formats` and `ops` are whole folders.
ROOMS = {
    "model": ({"formats", "ops"}, {"torch", "safetensors"}),
    "chat": ({"formats"}, {"tokenizers"}),
    "sampling": (set(), {"torch"}),
    "decode": ({"model", "chat", "sampling", "speculate"}, {"torch"}),
    "speculate": ({"decode", "model", "sampling"}, {"torch"}),
    "session": ({"decode", "speculate", "model", "chat", "sampling", "ops"}, {"torch"}),
    "prompts": ({"decode", "session", "chat", "console"}, set()),
    "generate": (
        {"decode", "session", "speculate", "prompts", "model", "chat", "sampling", "ops", "formats", "console"},
        {"torch"},
    ),
    "convert": ({"model", "formats", "ops", "chat", "console"}, {"torch", "safetensors"}),
    "train": (
        {
            "model",
            "ops",
            "objectives",
            "optimizers",
            "stages",
            "lora",
            "configs",
            "data",
            "chat",
            "decode",
            "sampling",
            "formats",
        }
        | {"console"},
        {"torch", "matplotlib", "rich", "wandb"},
    ),
    "stages": (
        {"model", "objectives", "rewards", "lora", "data", "configs", "chat", "decode", "sampling", "formats"}
        | {"console"},
        {"torch", "safetensors"},
    ),
    "objectives": ({"model", "ops"}, {"torch"}),
    "optimizers": ({"model", "configs"}, {"torch"}),
    "rewards": ({"chat"}, set()),
    "lora": ({"model"}, {"torch", "safetensors"}),
    "evaluate": (
        {"decode", "model", "chat", "sampling", "rewards", "data", "formats", "console"},
        {"torch", "matplotlib"},
    ),
    "bench": ({"generate", "model", "chat", "ops", "formats", "console", "bench_report"}, {"torch"}),
    "bench_train": (
        {"bench", "bench_report", "train", "model", "chat", "configs", "data", "formats", "console"},
        {"torch", "numpy", "yaml"},
    ),
    "bench_tokens": (
        {"bench", "bench_train", "bench_report", "configs", "data", "formats", "console"},
        {"numpy", "yaml"},
    ),
    "bench_report": ({"formats"}, {"matplotlib", "rich"}),
    "bench_convert": ({"bench", "formats", "console"}, set()),
    "bench_quality": ({"bench", "model", "chat", "decode", "data", "formats", "console"}, {"torch"}),
    "console": (set(), {"rich"}),
    "ops": ({"formats", "console"}, {"torch", "triton", "numpy"}),
    "formats": (
        {"console"},
        {"gguf", "numpy", "torch", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "markupsafe", "yaml"},
    ),
    "configs": (set(), {"yaml"}),
    "data": (
        {"formats", "console"},
        {"numpy", "tokenizers", "datasets", "rich", "huggingface_hub", "pyarrow", "jinja2"},
    ),
}
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in ROOMS]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level names of all imports of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; every import names its room"
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    rooms, packages = ROOMS[room(path)]
    extra = imported(path) - rooms - packages - {room(path)}
    assert not extra, f"{path.name} imports {', '.join(sorted(extra))}; see the table of rooms"


def test_every_python_file_lives_in_a_room():
    strangers = (
        {room(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if ".venv" not in path.parts}
        - set(ROOMS)
        - {"tests"}
    )
    assert not strangers, f"{strangers} are in no row of the table of rooms"


def test_the_product_never_imports_the_oracle():
    assert all("transformers" not in imported(path) for path in FILES)
