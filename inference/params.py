"""How to choose tokens and when to stop: the settings of a reply, and where their defaults come from.

Needs no PyTorch until a reply begins, so that a command can check its arguments before PyTorch is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What the model card advises (https://huggingface.co/Qwen/Qwen3-0.6B#best-practices). generation_config.json of a model
# that can do both holds the thinking values alone.
THINKING_ADVICE = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
ANSWER_ADVICE = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}


MOST_GUESSES = 7  # of speculation in one pass; more are seldom right


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError for a value out of its range."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token (greedy)
    top_k: int = 0  # only the k likeliest; 0, or -1 as vLLM writes it: all
    top_p: float = 1.0  # only the fewest tokens that hold this probability together
    min_p: float = 0.0  # only tokens at least this likely, relative to the likeliest
    presence_penalty: float = 0.0  # taken off the logit of each token that was generated before
    frequency_penalty: float = 0.0  # the same for each time that it was generated
    repetition_penalty: float = 1.0  # makes each token of prompt and reply less likely by this factor
    max_new_tokens: int = 32768
    stop: tuple[str, ...] = ()  # texts that end the reply and are not part of it; one alone may be given as a str
    seed: int | None = None  # None: a fresh one each time

    def __post_init__(self):
        for name, low, high, meaning in (
            ("temperature", 0, 100, "0 is greedy"),
            ("top_k", -1, math.inf, "0 and -1 are off"),
            ("top_p", 0, 1, "1 is off"),
            ("min_p", 0, 1, "0 is off"),
            ("presence_penalty", -2, 2, "0 is off"),
            ("frequency_penalty", -2, 2, "0 is off"),
            ("repetition_penalty", 0.01, 100, "1 is off"),
            ("max_new_tokens", 1, math.inf, "the length limit of a reply"),
        ):
            whole = name in ("top_k", "max_new_tokens")
            value = number(name, getattr(self, name), whole)
            object.__setattr__(self, name, value)
            if not low <= value <= high:
                range_ = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"{name} is {value}, but must be {range_} ({meaning})")
        if self.seed is not None:
            object.__setattr__(self, "seed", number("seed", self.seed, whole=True))
            if not 0 <= self.seed < 1 << 63:
                raise ValueError(f"seed is {self.seed}, which is not a whole number from 0 to 2^63 - 1")
        if isinstance(self.stop, str):  # a str is a sequence of its letters, each of which would end the reply
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, which is neither a text nor a list of texts")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(self.stop):
            raise ValueError("stop has an empty text, which would end every reply at once")

    def uniforms(self) -> "Uniforms":
        """The random numbers of one reply. Of the CPU, so that a seed means the same text on every device."""
        import torch

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return Uniforms(generator)


class Uniforms:
    """A generator's numbers from 0 to 1, drawn many at a time: one call of PyTorch between two tokens takes 0.2 ms."""

    AHEAD = 64

    def __init__(self, generator: "torch.Generator", ahead: Sequence[float] = ()):
        self.generator, self.ahead = generator, list(ahead)  # the next one is the last

    def next(self) -> float:
        if not self.ahead:
            import torch

            self.ahead = torch.rand(self.AHEAD, generator=self.generator, dtype=torch.float64).tolist()[::-1]
        return self.ahead.pop()

    def copy(self) -> "Uniforms":
        """One that gives the same numbers."""
        return Uniforms(self.generator.clone_state(), self.ahead)


def number(name: str, value: Any, whole: bool) -> int | float:
    """A number of Python's or NumPy's as Python's own. ValueError for anything else, and for a truth value."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} is {value!r}, which is not a {'whole ' if whole else ''}number")
    return int(value) if isinstance(value, Integral) else float(value)


def recommended(generation_config: dict[str, Any], thinking: bool, **chosen: Any) -> SamplingParams:
    """The checkpoint's own settings, the model card's advice where it has none, and `chosen` above both.

    `chosen` values of None do not count. Raises ValueError for a generation_config.json with impossible values.
    """
    names = {field.name for field in fields(SamplingParams)} - {"max_new_tokens", "stop", "seed"}
    stated = {name: value for name, value in generation_config.items() if name in names and value is not None}
    if generation_config.get("do_sample") is False:
        stated["temperature"] = 0.0
    is_thinking_advice = all(stated.get(name, value) == value for name, value in THINKING_ADVICE.items())
    if not thinking and (not stated or is_thinking_advice):
        stated |= ANSWER_ADVICE
    try:
        params = SamplingParams(**(THINKING_ADVICE | stated))
    except (ValueError, TypeError) as error:
        raise ValueError(f"generation_config.json: {error}") from None
    return replace(params, **{name: value for name, value in chosen.items() if value is not None})


def sampling_flags(options: Any) -> dict[str, Any]:
    """The fields of SamplingParams that a command line gives; one out of its range is named by its flag."""
    names = [field.name for field in fields(SamplingParams)]
    given = {name: getattr(options, name, None) for name in names}
    given["stop"] = given["stop"] and tuple(given["stop"])
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        try:
            SamplingParams(**{name: value})
        except ValueError as error:
            raise ValueError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from None
    return given
