"""What the engine's thread computes besides replies: probabilities of a given text, and embeddings.

Each is a generator that computes a piece and yields, so that running replies wait for a piece and no longer.
"""

import base64
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inference.decode import new_cache
from inference.sampling import NotFinite
from model import Qwen3

PIECE = 128  # positions of one piece; their logits are 78 MB at Qwen3's vocabulary


@torch.inference_mode()
def _piece(model: Qwen3, ids: Sequence[int], cache, logits: bool) -> Tensor:
    chunk = torch.tensor([ids], device=model.device)
    return (model(chunk, cache) if logits else model.model(chunk, cache))[0]


def score(model: Qwen3, ids: Sequence[int], entry: Callable[[Tensor, int], dict]) -> Iterator[None]:
    """Returns `entry(logits [V], token)` for each token of a prompt but the first."""
    cache, found = new_cache(model, len(ids)), []
    for start in range(0, len(ids) - 1, PIECE):
        piece = ids[start : min(start + PIECE, len(ids) - 1)]
        rows = _piece(model, piece, cache, logits=True)
        found += [entry(row, token) for row, token in zip(rows, ids[start + 1 :], strict=False)]
        yield
    return found


def embed(model: Qwen3, prompts: Sequence[Sequence[int]], dimensions: int | None) -> Iterator[None]:
    """Returns the embedding of each prompt, float32: the last token's final hidden state, its first `dimensions`
    numbers, L2-normalised. It is sentence-transformers' recipe for Qwen3-Embedding (arXiv:2506.05176).

    Raises NotFinite.
    """
    found = []
    for ids in prompts:
        cache = new_cache(model, len(ids))
        for start in range(0, len(ids), PIECE):
            states = _piece(model, ids[start : start + PIECE], cache, logits=False)
            yield
        found.append(torch.nn.functional.normalize(states[-1, :dimensions].float(), dim=-1).cpu())
        if not found[-1].isfinite().all():
            raise NotFinite("the model's final hidden state is not finite; try --dtype float32")
    return found


def written(vector: Tensor, encoding: str) -> list[float] | str:
    """An embedding as numbers, or as the base64 of little-endian float32, which OpenAI's client asks for."""
    return (
        base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
    )
