"""What the test has in common with the training of the bundled model: the figures of its card.

python data/corpus/overlap.py      a minute; its options describe another run than `make tiny`

A held-out question is never asked in training. But a trace may work out the same sum on its way to something else, and
a held-out phrasing may be close to a trained one. This command counts how often, and how close.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import console
from data.corpus.examples import FAMILIES, completion, document, training_example, unseen_examples
from data.corpus.preferences import preference_example
from data.corpus.tasks import Pieces
from data.corpus.tokenizer import TINY, pieces_of

VALIDATION = 4 * 48  # rows of one validation in configs/tiny-sft.yaml


def training_texts(seed: int, documents: int, conversations: int, pairs: int, pieces: Pieces) -> Iterator[str]:
    """All that the stages learn from, as text."""
    for index in range(documents):
        yield document(seed, index, pieces)
    for index in range(conversations):
        yield completion(training_example(seed, index, pieces))
    for index in range(pairs):
        pair = preference_example(seed, index, pieces)
        yield pair.chosen + "\n" + pair.rejected


def worked_inside(lines: set[str], seed: int, count: int, pieces: Pieces) -> dict[str, float]:
    """Family -> the share of unseen questions whose problem, as the first line of its trace states it, is among
    `lines`."""
    found: dict[str, list[bool]] = {name: [] for name in FAMILIES}
    for example in unseen_examples(seed, count, pieces):
        found[example.problem.family].append(example.trace.partition("\n")[0] in lines)
    return {name: sum(inside) / len(inside) for name, inside in found.items()}


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's: insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for number, x in enumerate(a, 1):
        before, row[0] = row[0], number
        for place, y in enumerate(b, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (x != y))
    return row[-1]


def phrasing_distances(name: str, questions: int = 5, trained: int = 2000) -> list[int]:
    """For each held-out phrasing of a family, asked about several facts: how many words are between it and the nearest
    trained phrasing (the nearest of `trained` drawn ones)."""
    family, rng, found = FAMILIES[name], Random(f"phrasings {name}"), {}
    for _ in range(questions):
        facts = family.sample(rng)
        near = {tuple(family.ask(facts, rng, False).split()) for _ in range(trained)}
        for asked in {family.ask(facts, rng, True) for _ in range(50)}:
            found[asked] = min(distance(asked.split(), other) for other in near)
    return list(found.values())


def repeated_rows(seen: set[str], seed: int, count: int, pieces: Pieces) -> int:
    """How many rows of a validation occur in training, word for word."""
    return sum(_row(seed, index, pieces, unseen=True) in seen for index in range(count))


def _row(seed: int, index: int, pieces: Pieces, unseen: bool = False) -> str:
    example = training_example(seed, index, pieces, unseen)
    return repr((example.messages, completion(example)))


def main() -> None:
    parser = console.ArgumentParser(description="What the test has in common with the training of the bundled model.")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the corpus (default: 0)")
    add("--count", type=int, default=3300, metavar="N", help="unseen questions (default: 3300)")
    add("--documents", type=int, default=1200 * 48, metavar="N", help="texts of pretraining (default: 57,600)")
    add("--conversations", type=int, default=5500 * 48, metavar="N", help="rows of SFT (default: 264,000)")
    add("--pairs", type=int, default=400 * 48, metavar="N", help="pairs of DPO (default: 19,200)")
    arguments = parser.parse_args()
    if arguments.count < len(FAMILIES):
        raise ValueError(f"--count {arguments.count}: give at least {len(FAMILIES)}, one question a family")
    seed, pieces = arguments.seed, pieces_of(TINY)
    texts = training_texts(seed, arguments.documents, arguments.conversations, arguments.pairs, pieces)
    lines = {line for text in console.counted(texts, "training texts") for line in text.split("\n")}
    inside = worked_inside(lines, seed, arguments.count, pieces)
    print("| family | worked inside a training trace | words to the nearest trained phrasing (mean, least) |")
    print("|---|---|---|")
    for name, share in inside.items():
        words = phrasing_distances(name)
        print(f"| {name} | {share:.1%} | {sum(words) / len(words):.1f}, {min(words)} |")
    seen = {_row(seed, index, pieces) for index in range(arguments.conversations)}
    print(f"\n{repeated_rows(seen, seed, VALIDATION, pieces)} of {VALIDATION} validation rows occur in training.")


if __name__ == "__main__":
    console.run(main)
