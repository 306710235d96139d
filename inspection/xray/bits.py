"""How well a model knows a row already: bits per token of what the row teaches, -log2 p of each learnt token."""

import math
from collections.abc import Callable

from data.sources import IGNORED
from inference.likelihood import Scorer
from inspection.xray.masks import Mask
from model import Qwen3


def bits_under(model: Qwen3, sequence: int) -> Callable[[Mask], float | None]:
    """A mask's bits per learnt token, over those of its rows that fit; None where nothing is learnt."""
    scorer, vocabulary = Scorer(model), model.config.vocab_size

    def measure(mask: Mask) -> float | None:
        found: list[float] = []
        for row in mask.rows:
            targets = list(map(int, row.targets))
            learnt = [place for place, target in enumerate(targets) if target != IGNORED]
            if not learnt or row.length > sequence:
                continue
            first, last = learnt[0], learnt[-1]
            ids = [*map(int, row.ids[: last + 1]), targets[last]]
            if max(ids) >= vocabulary:
                raise ValueError(
                    "--model: its vocabulary is smaller than the tokenizer's ids; give its own --tokenizer"
                )
            values = scorer.logprobs(ids[: first + 1], ids[first + 1 :])
            found += [values[place - first] for place in learnt]
        return -sum(found) / len(found) / math.log(2) if found else None

    return measure
