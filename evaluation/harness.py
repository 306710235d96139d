"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on our model: every task that it has.

Its `hf` model is the reference: the same tokens go in, and log likelihoods agree to 1e-4 in float32. What a task's
questions share, above all its few-shot examples, is computed once (likelihood.py keeps one cache).
"""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import console
from evaluation.folder import OUTPUT, RESULTS, Folder, line
from evaluation.results import score
from evaluation.run import Evaluated
from formats.files import write_text
from formats.record import commit
from inference.engine import Engine, generate_batch
from inference.likelihood import Scorer
from inference.params import SamplingParams
from inference.session import Listener
from ops.limits import describe

ROOT = Path(__file__).resolve().parent.parent
MAX_GEN_TOKENS = 256  # of the harness' hf model, where a task says nothing


@contextmanager
def without_our_evaluate() -> Iterator[None]:
    """The harness' tasks import the package `evaluate`, for which Python would find our command of that name."""
    path, ours = sys.path[:], sys.modules.pop("evaluate", None)
    sys.path[:] = [entry for entry in path if Path(entry or os.curdir).resolve() != ROOT]
    try:
        importlib.import_module("evaluate")
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)  # the harness has it by now
        if ours is not None:
            sys.modules["evaluate"] = ours


def language_model(evaluated: Evaluated, batch: int = 16, thinking: bool = True) -> Any:
    """An lm_eval TemplateLM of our model; a function, as lm_eval is imported only where it is asked for."""
    try:
        with without_our_evaluate():
            from lm_eval import utils
            from lm_eval.api.model import TemplateLM
    except ModuleNotFoundError as error:
        raise ValueError(f"--harness needs lm-evaluation-harness ({error}); pip install 'nanoqwen[harness]'") from None

    model, chat = evaluated.model, evaluated.chat

    class NanoqwenLM(TemplateLM):
        def __init__(self):
            super().__init__()
            self.scorer = Scorer(model)

        @property
        def eot_token_id(self) -> int:
            return chat.eos_token_id

        @property
        def max_length(self) -> int:
            return model.config.max_position_embeddings

        @property
        def tokenizer_name(self) -> str:
            return str(evaluated.facts["source"]).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return chat.templates.get("default") if chat_template else None

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat.render_text(chat_history, thinking, add_generation_prompt=add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return chat.encode(string)

        def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2]))  # shared beginnings
            found: dict[int, tuple[float, bool]] = {}
            for i in order:
                _, context, continuation = requests[i]
                # Cut from the left, as the hf model does.
                whole = [*context, *continuation][-(self.max_length + 1) :]
                continuation = whole[-len(continuation) :] if len(continuation) < len(whole) else whole[1:]
                scored = self.scorer.scored(whole[: len(whole) - len(continuation)], continuation)
                found[i] = sum(value for value, _ in scored), all(likeliest for _, likeliest in scored)
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=chat.encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = map(utils.make_disjoint_window, windows)
                totals.append(sum(sum(self.scorer.logprobs(context, text)) for context, text in pairs))
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked = [self._asked(*request.args) for request in requests]
            listeners = [Listener(chat, ids, params.stop, raw=True) for ids, params in asked]
            generate_batch(
                model,
                [ids for ids, _ in asked],
                [SamplingParams(**{**vars(params), "stop": ()}) for _, params in asked],
                until=[listener.heard for listener in listeners],
                engine=Engine(model, batch),
            )
            for listener in listeners:
                listener.finish()
            return [listener.answer.answer for listener in listeners]

        def _asked(self, context: str, settings: dict[str, Any]) -> tuple[list[int], SamplingParams]:
            until = settings.get("until") or []
            most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_GEN_TOKENS)))
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            given = {name: settings[name] for name in names if settings.get(name) is not None}
            if not settings.get("do_sample", given.get("temperature", 0) > 0):
                given["temperature"] = 0.0
            stop = tuple([until] if isinstance(until, str) else until)
            ids = chat.encode(context)[-(self.max_length - most) :]
            return ids, SamplingParams(**given, max_new_tokens=most, stop=stop, seed=0)

    return NanoqwenLM()


def run_harness(options: Namespace) -> None:
    """The tasks of the harness; a folder each, with its per-sample values as outputs."""
    evaluated = Evaluated(options)
    lm = language_model(evaluated, options.batch_size, options.thinking != "off")
    with without_our_evaluate():
        import lm_eval

        found = lm_eval.simple_evaluate(
            lm,
            tasks=list(options.tasks),
            num_fewshot=options.few_shot or None,
            limit=options.limit,
            apply_chat_template=options.chat_template,
            system_instruction=options.system,
            confirm_run_unsafe_code=options.run_code,
            bootstrap_iters=0,
            random_seed=options.seed,
        )
    for name, samples in found["samples"].items():
        metric = samples[0]["metrics"][0]
        folder = Folder(options.out / name if len(found["samples"]) > 1 else options.out)
        folder.begin(
            {
                "task": name,
                "metric": metric,
                "scorer": "harness",
                "headline": None,
                "samples": 1,
                "data": {"source": name, "sha256": "".join(s["doc_hash"] for s in samples)[:64], "revision": None},
                "harness": {"version": lm_eval.__version__, "config": _plain(found["configs"].get(name))},
                "chat_template": chat_template_of(options, evaluated),
                "thinking": options.thinking != "off",
                "thinking_budget": 0,
                "few_shot": options.few_shot,
                "seed": options.seed,
                "model": evaluated.facts,
                "price_per_hour": options.price_per_hour,
                "started": found["date"] if isinstance(found.get("date"), str) else str(found.get("date", "")),
                "machine": describe(),
                "commit": commit(),
                "command": sys.argv[1:],
            },
            resume=False,
        )
        seconds = float(found.get("total_evaluation_time_seconds") or 0) / max(len(samples), 1)
        folder.append([_output(sample, metric, seconds) for sample in samples])
        if all(isinstance(sample[metric], int | float) for sample in samples):
            score(folder, "harness")
        else:  # a figure that is no mean over samples, as a perplexity: only the harness' own aggregate is given
            value = next(value for key, value in found["results"][name].items() if key.startswith(f"{metric},"))
            results = {"schema": RESULTS, "task": name, "metric": metric, "scorer": "harness", "value": value}
            write_text(folder.results_file, line(results | {"low": None, "high": None, "n": len(samples)}))
        print(f"{name}: {len(samples):,} questions")
        for key, value in found["results"][name].items():
            if isinstance(value, float):
                print(f"  {key}: {value:.4f}")
        console.notice(f"wrote {folder.path}")


def chat_template_of(options: Namespace, evaluated: Evaluated) -> str | None:
    return evaluated.chat.templates.get("default") if options.chat_template else None


def _output(sample: dict[str, Any], metric: str, seconds: float) -> dict[str, Any]:
    arguments = sample["arguments"]
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    prompt = first.get("arg_0") if isinstance(first, dict) else first[0]
    value = sample[metric]
    return {
        "schema": OUTPUT,
        "id": f"{sample['doc_id']}/{sample.get('filter', 'none')}",
        "question": str(sample["doc_id"]),
        "groups": [],
        "prompt": str(prompt),
        "reference": _plain(sample["target"]),
        "answer": str(_plain(sample["filtered_resps"])),
        "responses": _plain(sample["resps"]),
        "metrics": {metric: float(value) if isinstance(value, int | float | bool) else None},
        "seconds": seconds,
    }


def _plain(value: Any) -> Any:
    """What JSON can hold of the harness' objects."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
