"""One evaluation from its questions to its results: prepares the protocol, asks what is not answered yet, scores."""

import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import console
from chat import Chat
from evaluation import families, tasks
from evaluation.ask import Asker
from evaluation.folder import Folder
from evaluation.results import SCORERS, score
from evaluation.tasks import Question, Task
from formats.adapter import text_path
from formats.checkpoint import open_checkpoint
from formats.files import sha256
from formats.record import commit
from formats.source import resolve
from inference.params import recommended
from model import load
from ops.devices import pick_device
from ops.limits import describe

BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PACKAGES = ("torch", "tokenizers", "safetensors", "numpy")


class Evaluated:
    """A model with its tokenizer, and what tells it from others."""

    def __init__(self, options: Namespace):
        path = resolve(options.model)
        adapter = None if options.adapter is None else resolve(options.adapter, "--adapter")
        self.chat = Chat.from_pretrained(text_path(path, adapter))
        checkpoint = open_checkpoint(path, adapter)
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        self.model = load(checkpoint, pick_device(options.device, "--device"), dtype)
        if options.quantize:
            from ops.quant import quantize_

            quantize_(self.model, options.quantize)
        names = (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        )
        files = [*checkpoint.files, *(path / name for name in names)]
        self.facts = {
            "source": str(options.model),
            "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files if f.is_file()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantize": options.quantize,
        }

    def pieces(self, word: str) -> list[str]:
        return [self.chat.decode([index]) for index in self.chat.encode(word)]


def run(evaluated: Evaluated, name: str, options: Namespace, out: Path) -> dict[str, Any]:
    """results.json of one task (a name, or the file of --data). Continues what `out` holds where --resume is given."""
    task, found, headline = posed(evaluated, name, options)
    thinking = options.thinking != "off"
    chosen = dict(options.sampling)
    if task.sampling == "greedy":
        chosen.setdefault("temperature", 0.0)
    chosen.setdefault("max_new_tokens", task.max_new_tokens)
    params = recommended(evaluated.model.generation_config, thinking, **chosen)
    if options.samples > 1 and params.temperature == 0:
        raise ValueError(f"--samples {options.samples} of greedy replies are all the same; give --temperature")
    folder, settings = Folder(out), {name: value for name, value in vars(params).items() if name != "seed"}
    protocol = {
        "task": task.name,
        "metric": task.metric,
        "scorer": task.scorer,
        "headline": headline,
        "data": {
            "source": task.data,
            "subset": task.subset,
            "split": task.split,
            "limit": options.limit,
            "sha256": tasks.digest(found),
            "questions": len(found),
        },
        "prompt_template": task.question,
        "few_shot": options.few_shot,
        "chat_template": evaluated.chat.templates.get("default"),
        "system": options.system,
        "thinking": thinking,
        "thinking_budget": options.thinking_budget or 0,
        "sampling": settings,
        "seed": options.seed,
        "samples": options.samples,
        "model": evaluated.facts,
        "price_per_hour": options.price_per_hour,
        "batch": options.batch_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe(),
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": sys.argv[1:],
    }
    done = folder.begin(protocol, options.resume)
    asker = Asker(
        evaluated.model,
        evaluated.chat,
        replace(params, seed=options.seed),
        thinking=thinking,
        thinking_budget=options.thinking_budget or 0,
        system=options.system,
        seed=options.seed,
        samples=options.samples,
        batch=options.batch_size,
    )
    order = asker.ids(found)
    with console.task_progress(f"{task.name}", len(order)) as progress:
        progress(len(done))
        asker.ask(found, folder, done, progress)
    folder.sort(order)
    return score(folder, task.scorer)


def posed(evaluated: Evaluated, name: str, options: Namespace) -> tuple[Task, list[Question], str | None]:
    """A task, its questions, and the group of them that represents the whole (None: all)."""
    limit, few = options.limit, options.few_shot
    if name == "families":
        if few or options.scorer or options.data:
            raise ValueError("families has its own questions and verdict; leave --few-shot, --scorer and --data out")
        if options.thinking == "off":
            raise ValueError("families asks with thinking and without it, in columns of its own; leave --thinking out")
        task = Task("families", "data/corpus", "families", max_new_tokens=families.LONGEST)
        count = 550 if limit is None else limit
        return task, list(families.family_questions(options.seed, count, evaluated.pieces)), "on"
    if name == "arithmetic":
        task, records, examples = (
            Task("arithmetic", "arithmetic", options.scorer or "likelihood"),
            tasks.arithmetic(),
            [],
        )
        if task.scorer.startswith("likelihood") or task.scorer == "letter":
            task = replace(task, choices="choices")
        examples, records = records[:few], records[few : None if limit is None else few + limit]
    elif options.data:
        source = Task(name, options.data, "exact")
        records = tasks.read(source, None if limit is None else limit + few)
        task = replace(tasks.task_of_file(options.data, records, options.scorer), name=name)
        examples, records = records[:few], records[few:]
    else:
        known = tasks.published()
        if name not in known:
            hint = console.did_you_mean(name, [*known, "families", "arithmetic"])
            raise ValueError(f"no task {name!r}{hint}; `evaluate.py tasks` lists them, --data FILE takes your own rows")
        task = known[name]
        task = replace(task, scorer=options.scorer) if options.scorer else task
        records = tasks.read(task, limit)
        examples = tasks.read(task, few, task.few_shot_split) if few else []
    if task.scorer not in SCORERS or task.scorer in ("families", "harness"):
        names = [name for name in SCORERS if name not in ("families", "harness")]
        raise ValueError(f"--scorer {task.scorer}: the scorers are {', '.join(names)}")
    if task.scorer == "function" and not options.run_code:
        raise ValueError(f"{name} runs code that the model writes, with limits but your rights; add --run-code")
    if len(examples) < few:
        raise ValueError(f"--few-shot {few}: {task.data} has only {len(examples)} rows for examples")
    if not records:
        raise ValueError(f"{task.data}: no row is left behind the {few} examples of --few-shot")
    return task, list(tasks.questions(task, records, examples)), None
