"""From rows to tensors: the batches that an objective takes.

Each kind has `ids` and `targets` [B, T] and the `lengths` of its sequences, LongTensor [B] on the CPU (None: all T):
padding is at the end and never a target. `count` is what its loss is divided by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.packing import Sequence, in_parts
from data.sources import IGNORED, Row


class Batch(NamedTuple):
    """ids [B, T]; targets [B, T], the token that follows each position or IGNORED; mask bool [B, 1, T, T] or None."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def count(self) -> int:
        """Targets."""
        return int((self.targets != IGNORED).sum())


class Pairs(NamedTuple):
    """Rows 2i and 2i + 1 are the chosen and the rejected answer to one prompt; targets are those of the answers."""

    ids: Tensor
    targets: Tensor
    reference: Tensor
    """float32 [B]: log-probability of each answer under the starting weights."""
    lengths: Tensor | None = None
    mask: None = None

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.ids) // 2


class Rollouts(NamedTuple):
    """Replies that the model wrote itself; targets are the replies' tokens, N of them in row-major order."""

    ids: Tensor
    targets: Tensor
    advantages: Tensor
    """float32 [B]"""
    shares: Tensor
    """float32 [B]: the weight of each token of a reply."""
    count: float
    """This micro-batch's share of what the step's loss is divided by."""
    old: Tensor | None = None
    """float32 [N]: log-probabilities when the replies were written; None: the current ones."""
    reference: Tensor | None = None
    """float32 [N]: log-probabilities under the starting weights; None: no KL."""
    lengths: Tensor | None = None
    mask: None = None


def batches(rows: list[Row], parts: int, device: torch.device, end_of_text: int | None = None) -> list[Batch]:
    """Rows in at most `parts` padded batches, those of similar length together.

    With `end_of_text`, tokens do not attend to anything before the last such token: each sees only its own document.
    """
    made = []
    for chosen in in_parts(rows, parts):
        ids, targets = padded_rows(chosen, device)
        mask = None if end_of_text is None else document_mask((ids == end_of_text).cumsum(1))
        made.append(Batch(ids, targets, mask, lengths_of(chosen)))
    return made


def packed_batch(sequences: list[Sequence[Row]], device: torch.device) -> Batch:
    """Several rows to a sequence; none attends to another.

    Within a sequence most rows do not begin at position 0. Attention depends only on differences of rotary positions
    (RoFormer, section 3.4.1), so each row has the loss that it has by itself.
    """
    ids = padded([[token for row in rows for token in row.ids] for rows in sequences], 0)
    targets = padded([[token for row in rows for token in row.targets] for rows in sequences], IGNORED)
    document = padded([[n for n, row in enumerate(rows) for _ in row.ids] for rows in sequences], -1)
    return Batch(ids.to(device), targets.to(device), document_mask(document.to(device)), lengths_of(sequences))


def lengths_of(rows: list[Row] | list[Sequence[Row]]) -> Tensor:
    return torch.tensor([row.length for row in rows])


def real_lengths(batch: Batch | Pairs | Rollouts) -> Tensor:
    """The length of each sequence without its padding: LongTensor [B]."""
    return torch.full((len(batch.ids),), batch.ids.shape[1]) if batch.lengths is None else batch.lengths


def padded_rows(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """-> ids and targets, LongTensors [rows, longest]"""
    return padded([row.ids for row in rows], 0).to(device), padded([row.targets for row in rows], IGNORED).to(device)


def padded(rows: list, fill: int) -> Tensor:
    """Rows of ids, as lists or numpy arrays -> LongTensor [rows, longest]"""
    filled = torch.full((len(rows), max(map(len, rows))), fill)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = torch.as_tensor(row)
    return filled


def document_mask(document: Tensor) -> Tensor:
    """document [B, T], the number of each token's document -> bool [B, 1, T, T]: causal, within one document."""
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]
