"""How far a model's logits are from those of the same weights in float32, over unseen questions with their replies."""

import torch

from chat import Chat
from data.corpus.examples import completion, unseen_examples
from data.corpus.tokenizer import TINY, pieces_of
from inference.decode import new_cache
from model import Qwen3

AT_ONCE = 16  # tokens of a forward pass, few enough to be computed as one by one


def conversations(chat: Chat, count: int) -> list[list[int]]:
    """Unseen questions and their gold replies, as ids."""
    pieces = pieces_of(TINY)  # whose spelling the traces show; any model's tokenizer reads them as text
    return [
        [*chat.render(example.messages, example.thinking), *chat.encode(completion(example))]
        for example in unseen_examples(0, count, pieces)
    ]


@torch.inference_mode()
def logits(model: Qwen3, texts: list[list[int]]) -> torch.Tensor:
    """[all tokens, V] in float32, each position's mean taken away."""
    found = []
    for ids in texts:
        cache = new_cache(model, len(ids))
        for start in range(0, len(ids), AT_ONCE):
            found.append(model(torch.tensor([ids[start : start + AT_ONCE]]), cache)[0].float())
    found = torch.cat(found)
    return found - found.mean(-1, keepdim=True)


def compare(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """Relative error, KL(exact || found) in nats per token, share of equal likeliest tokens."""
    error = (found - exact).norm() / exact.norm()
    logp, logq = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = (logp.exp() * (logp - logq)).sum(-1).mean()
    return error.item(), divergence.item(), (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
