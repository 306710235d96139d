"""Evaluate a model, and keep what is needed to check the number: `python evaluate.py run gsm8k --model SRC --out OUT`.

    run            a task's questions -> OUT/outputs.jsonl, results.json, report.md
    rescore        the saved outputs, scored again without the model
    compare        two runs over the same questions, paired
    report         a table of runs; their curve over the thinking budget
    perplexity     of a text
    export         what a model card takes
    tasks          the tasks and scorers that there are

What it is made of lives in evaluation/. Nothing but run and perplexity imports torch.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import console

SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "presence_penalty": float}
SAMPLING |= {"repetition_penalty": float, "max_new_tokens": int}
EXAMPLES = """\
  python evaluate.py run families --model models/tiny --limit 22 --out OUT/families
  python evaluate.py run mine --data rows.jsonl --model SRC --thinking on --out OUT/mine
  python evaluate.py rescore OUT/mine --scorer normalised
  python evaluate.py compare OUT/a OUT/b
"""


def parse_arguments(arguments: list[str]) -> Namespace:
    parser = console.ArgumentParser(
        prog="evaluate.py", description="Evaluate a model: run tasks, score again, compare.", examples=EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str):
        return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")

    one = command("run", "put a task's questions to a model and score its answers")
    one.add_argument("tasks", nargs="+", metavar="TASK", help="families, arithmetic, gsm8k, …; with --data any name")
    add_model(one)
    add = one.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where outputs and results go; of several tasks a folder each",
    )
    add("--resume", action="store_true", help="continue the run in --out")
    add("--data", metavar="FILE", help="rows of {question, answer} or {question, choices, label}")
    add("--limit", type=int, metavar="N", help="only the first N questions (families: N of each column)")
    add("--few-shot", type=int, default=0, metavar="N", help="examples before each question (default: 0)")
    add("--scorer", metavar="NAME", help="how answers are read, instead of the task's own")
    add("--run-code", action="store_true", help="let tasks run the code that the model writes")
    add("--harness", action="store_true", help="the tasks are those of lm-evaluation-harness, an extra to install")
    add("--chat-template", action="store_true", help="with --harness: put questions as a chat")
    add("--thinking", choices=("on", "off"), default="on", help="think before answering (default: on)")
    add("--thinking-budget", type=int, metavar="N", help="end the thinking after N tokens (default: no limit)")
    add("--system", metavar="TEXT", help="a system message before each question that has none")
    for name, kind in SAMPLING.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X" if kind is float else "N")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the questions that are generated and of sampling (default: 0)",
    )
    add(
        "--samples",
        type=int,
        default=1,
        metavar="K",
        help="answers to each question, for pass@k and the majority's vote",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="questions side by side (default: 16)")
    add("--price-per-hour", type=float, metavar="X", help="of this machine, for the cost of 100 prompts")
    add("--json", action="store_true", help="print results.json")
    again = command("rescore", "score saved outputs again, without the model")
    again.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    again.add_argument("--scorer", metavar="NAME", help="another scorer than the task's own")
    again.add_argument("--json", action="store_true")
    paired = command("compare", "two runs over the same questions: McNemar's test, a paired interval, each question")
    paired.add_argument("folders", nargs=2, type=Path, metavar="DIR")
    paired.add_argument("--json", action="store_true", help="with every question that differs")
    table = command("report", "a table with a row for each run")
    table.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    table.add_argument("--groups", nargs="+", default=[], metavar="GROUP", help="columns for these groups of questions")
    table.add_argument("--plot", type=Path, metavar="FILE", help="the value against the thinking budget, as a picture")
    text = command("perplexity", "perplexity of a text, by disjoint windows or sliding ones")
    text.add_argument("file", nargs="?", metavar="FILE", help="UTF-8 text (default: a bundled one)")
    add_model(text)
    text.add_argument("--window", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    text.add_argument(
        "--stride", type=int, metavar="N", help="sliding windows that begin N tokens apart (default: disjoint)"
    )
    text.add_argument("--json", action="store_true")
    card = command("export", "what a model card takes: .eval_results, a table, the manifest's evals")
    card.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    card.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model's folder, or any other")
    card.add_argument("--source", metavar="URL", help="where the raw outputs are published")
    command("tasks", "the tasks and scorers, each with what it takes for right and wrong")
    options = parser.parse_args(arguments)
    if options.command == "run":
        check_run(options)
    return options


def add_model(parser) -> None:
    add = parser.add_argument
    add("--model", default="models/tiny", metavar="SRC", help="directory, hub id or .gguf file (default: models/tiny)")
    add("--adapter", metavar="DIR", help="a PEFT adapter (LoRA) to merge into it: directory or hub id")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--quantize", choices=("int8", "int4"), help="quantise the weights while loading")
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of the CPU (default: PyTorch's choice; 1 suits a tiny model)",
    )


def check_run(options: Namespace) -> None:
    """ValueError for values out of their range and flags that contradict each other."""
    for name, low in (("limit", 1), ("few_shot", 0), ("samples", 1), ("batch_size", 1), ("thinking_budget", 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {low}")
    if options.thinking_budget and options.thinking == "off":
        raise ValueError("--thinking-budget limits the thinking that --thinking off turns off; leave one of them out")
    if options.price_per_hour is not None and not 0 <= options.price_per_hour < 1e9:
        raise ValueError(f"--price-per-hour {options.price_per_hour}: give a price from 0 on")
    if options.data and len(options.tasks) > 1:
        raise ValueError(f"--data {options.data} is one task; name it once, not {', '.join(options.tasks)}")
    from inference.params import sampling_flags

    options.sampling = sampling_flags(options)


def run(options: Namespace) -> None:
    import torch

    from evaluation.run import Evaluated
    from evaluation.run import run as run_task

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.harness:
        from evaluation.harness import run_harness

        run_harness(options)
        return
    evaluated = Evaluated(options)
    for name in options.tasks:
        out = options.out / name if len(options.tasks) > 1 else options.out
        tell(run_task(evaluated, name, options, out), out, options.json)


def tell(results: dict, out: Path, as_json: bool) -> None:
    from evaluation.report import percent

    if as_json:
        print(json.dumps(results, ensure_ascii=False))
        return
    print(f"{results['task']}: {results['metric']} {percent(results)} of {results['n']:,} questions")
    for name, found in {**results["groups"], **results.get("several", {})}.items():
        if ":" not in name:
            print(f"  {name}: {percent(found)}")
    console.notice(f"wrote {out}; read {out / 'report.md'}, or compare it: python evaluate.py compare {out} OTHER")


def rescore(options: Namespace) -> None:
    from evaluation.folder import open_folder
    from evaluation.results import SCORERS, score

    if options.scorer is not None and options.scorer not in SCORERS:
        raise ValueError(f"--scorer {options.scorer}: the scorers are {', '.join(SCORERS)}")
    for path in options.folders:
        folder = open_folder(path)
        tell(score(folder, options.scorer or folder.protocol()["scorer"]), path, options.json)


def compare(options: Namespace) -> None:
    from evaluation.compare import compare as compared
    from evaluation.compare import text
    from evaluation.folder import open_folder

    first, second = map(open_folder, options.folders)
    found = compared(first, second)
    print(json.dumps(found, ensure_ascii=False) if options.json else text(found, first, second))


def report(options: Namespace) -> None:
    from evaluation.folder import open_folder
    from evaluation.report import plot, table

    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {options.plot}: give a name that ends in .png, .svg or .pdf")
    folders = list(map(open_folder, options.folders))
    print(table(folders, options.groups))
    if options.plot:
        plot(folders, options.plot)
        console.notice(f"wrote {options.plot}")


def perplexity(options: Namespace) -> None:
    import torch

    from evaluation.perplexity import perplexity as measured
    from evaluation.perplexity import read_text
    from evaluation.run import Evaluated
    from inference.likelihood import Scorer

    if options.threads:
        torch.set_num_threads(options.threads)
    text = read_text(options.file)
    evaluated = Evaluated(options)
    ids = evaluated.chat.encode(text)
    sizes = [len(evaluated.chat.token_bytes(token)) for token in ids]
    with console.task_progress("perplexity", len(ids)) as progress:
        found = measured(Scorer(evaluated.model), ids, sizes, options.window, options.stride, progress)
    protocol = f"disjoint windows of {options.window:,} tokens"
    if options.stride is not None:
        protocol = f"windows of {options.window:,} tokens, {options.stride:,} apart"
    if options.json:
        print(json.dumps({"model": evaluated.facts, "protocol": protocol, **found._asdict()}, ensure_ascii=False))
    else:
        print(
            f"perplexity {found.value:.4f}, {found.bits_per_byte:.4f} bits a byte: {found.tokens:,} tokens, {protocol}"
        )


def export(options: Namespace) -> None:
    from evaluation.folder import open_folder
    from evaluation.report import evaluation_results, manifest_entries, table
    from formats.files import write_text

    folders = list(map(open_folder, options.folders))
    target = options.out / ".eval_results"
    target.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        write_text(target / f"{folder.protocol()['task']}.yaml", evaluation_results(folder, options.source))
    write_text(options.out / "evals.json", json.dumps(manifest_entries(folders), indent=2) + "\n")
    print(table(folders))
    console.notice(
        f"wrote {target}, and {options.out / 'evals.json'} for the manifest; the table above is for the card"
    )


def tasks(options: Namespace) -> None:
    from evaluation.results import LIKELIHOODS
    from evaluation.scoring import SCORERS
    from evaluation.tasks import published

    print("families     the bundled model's questions, family by family")
    print("arithmetic   200 questions with four choices, made from a seed")
    for name, task in published().items():
        print(f"{name:12} {task.data}, scored by {task.scorer}")
    for name, scorer in SCORERS.items():
        print(f"\nscorer {name}")
        for verdict, cases in (("right", scorer.right), ("wrong", scorer.wrong)):
            for answer, reference in cases:
                print(f"  {verdict}: {answer!r} for {reference!r}")
    print(f"\nscorers {', '.join(LIKELIHOODS)}: the choice with the largest log likelihood, plain or by its length")


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    globals()[options.command](options)


if __name__ == "__main__":
    console.run(main)
