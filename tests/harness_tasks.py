"""Tasks of lm-evaluation-harness that need nothing from anywhere: its three kinds of requests, and what they gave."""

import json
from pathlib import Path

import yaml


def write_tasks(folder: Path) -> list[str]:
    """Choices with examples, a text's likelihood, and replies → their names."""
    choices = [
        {"question": f"What is {a} + {b}?", "choices": [str(a + b), str(a + b + 1), str(a)], "label": 0}
        for a, b in ((7, 8), (12, 30), (5, 5), (9, 3), (31, 4))
    ]
    texts = [{"text": "How many times does the letter r appear in strawberry?" * n} for n in (1, 9)]
    found = {
        "tiny_choices": {
            "rows": choices,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "fewshot_split": "test",
            "num_fewshot": 1,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "tiny_text": {
            "rows": texts,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "tiny_replies": {
            "rows": [{"question": c["question"], "answer": c["choices"][0]} for c in choices],
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in found.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in task.pop("rows")))
        task |= {"task": name, "dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return list(found)


def values(nested) -> list:
    """All strings and numbers of nested lists, in order."""
    if isinstance(nested, list | tuple):
        return [value for one in nested for value in values(one)]
    return [nested]
