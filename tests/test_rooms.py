"""Who may import whom: no circle, and no arrow that runs back up. A new arrow is a decision, made in this table."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room: (other rooms it may import, packages it may import). A folder is one room; every room may use console.
COMMON = {"console"}
ROOMS = {
    "console": (set(), {"rich"}),
    "formats": (
        set(),
        {"gguf", "numpy", "torch", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "markupsafe", "yaml"},
    ),
    "data": ({"formats"}, {"numpy", "tokenizers", "datasets", "rich", "huggingface_hub", "pyarrow", "jinja2"}),
    "ops": ({"formats"}, {"torch", "triton", "numpy"}),
    "model": ({"formats", "ops"}, {"torch", "safetensors"}),
    "chat": ({"formats"}, {"tokenizers"}),
    "inference": ({"model", "chat", "data", "formats", "ops"}, {"torch", "numpy", "prompt_toolkit"}),
    "training": (
        {"model", "chat", "inference", "data", "formats", "ops"},
        {"torch", "safetensors", "yaml", "rich", "wandb", "matplotlib"},
    ),
    "inspection": (
        {"model", "chat", "inference", "formats", "data", "ops"},
        {
            *(
                "torch",
                "numpy",
                "markupsafe",
                "jinja2",
                "yaml",
                "jsonschema",
                "cyclonedx",
                "huggingface_hub",
                "tokenizers",
            ),
            *("duckdb", "pyarrow", "rensa", "mlcroissant", "rich", "matplotlib"),
        },
    ),
    "xray": ({"model", "chat", "inspection", "training", "data", "formats"}, {"rich"}),
    "audit": ({"model", "chat", "inspection", "formats"}, set()),
    "lens": ({"inspection", "inference", "formats"}, set()),
    "serving": (
        {"model", "chat", "inference", "formats"},
        {"torch", "numpy", "starlette", "uvicorn", "prometheus_client", "llguidance"},
    ),
    "generate": ({"inference"}, set()),
    "serve": ({"serving", "inference", "formats"}, set()),
    "convert": ({"model", "chat", "formats", "ops"}, {"torch", "safetensors"}),
    "train": (
        {"model", "chat", "inference", "training", "data", "formats", "ops"},
        {"torch", "matplotlib", "rich", "wandb"},
    ),
    "evaluation": (
        {"model", "chat", "inference", "data", "formats", "ops"},
        {"torch", "numpy", "yaml", "matplotlib", "jsonschema", "lm_eval"},
    ),
    "evaluate": ({"evaluation", "inference", "formats"}, {"torch"}),
    "benchmarks": (
        {"generate", "train", "model", "chat", "inference", "training", "inspection", "data", "formats", "ops"},
        {"torch", "numpy", "yaml", "matplotlib", "rich", "duckdb", "datasets", "pyarrow"},
    ),
    "bench": ({"benchmarks"}, set()),
}
PEERS = "benchmarks/peers"  # what the benchmarks measure against: no part of the product, and may import anything


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [
    path
    for path in ROOT.rglob("*.py")
    if room(path) in ROOMS and not path.relative_to(ROOT).as_posix().startswith(PEERS)
]


def modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; every import names its room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def imported(path: Path) -> set[str]:
    """Top-level names of all imports of a file."""
    return {name.partition(".")[0] for name in modules(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    rooms, packages = ROOMS[room(path)]
    extra = imported(path) - rooms - packages - COMMON - {room(path)}
    assert not extra, f"{path.name} imports {', '.join(sorted(extra))}; see the table of rooms"


def test_every_python_file_lives_in_a_room():
    strangers = (
        {room(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if ".venv" not in path.parts}
        - set(ROOMS)
        - {"tests", "docs"}
    )
    assert not strangers, f"{strangers} are in no row of the table of rooms"


def test_the_product_never_imports_the_oracle():
    assert all("transformers" not in imported(path) for path in FILES)


def test_no_circle_among_files():
    """Imports inside functions count too: they hide a circle from Python, not from a reader."""
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES}
    known = set(names.values())
    graph = {name: modules(path) & known - {name} for path, name in names.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
