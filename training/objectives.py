"""From a batch to a loss: what each stage of training minimises.

    pretrain, sft   Objective   -log p of each target                      sum over targets
    dpo             DPO         -log sigmoid of the margin of each pair    sum over pairs
    grpo            GRPO        clipped ratio times advantage, and KL      sum over tokens, each with its share

A step's loss is divided by the sum of its batches' `count`, so its gradient does not depend on how it is cut.

The logits of Qwen3's vocabulary would be the largest tensor of a training step (4 x 512 tokens x 151,936 x 4 bytes =
1.2 GB, and as much again for their gradient). ops/cross_entropy.py never holds more than a chunk of them.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Qwen3
from ops.cross_entropy import linear_cross_entropy
from training.batches import IGNORED, Batch, Pairs, Rollouts


def target_losses(model: Qwen3, batch: Batch | Pairs | Rollouts, reduction: str, temperature: float = 1.0) -> Tensor:
    """-log p of the batch's N targets in row-major order, float32 [N], or their sum (`reduction` none or sum).

    The logits are divided by `temperature`, as in sampling.
    """
    x = model.model(batch.ids, mask=batch.mask)
    has_target = batch.targets != IGNORED
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    x = x[has_target] if temperature == 1.0 else x[has_target] / temperature
    return linear_cross_entropy(x, head.weight, batch.targets[has_target], reduction=reduction, kernels=model.kernels)


def next_token_loss(model: Qwen3, batch: Batch) -> Tensor:
    """The sum of the losses over the batch's targets, float32 []. Pretraining and SFT."""
    return target_losses(model, batch, "sum")


def rows_of(batch: Batch | Pairs | Rollouts) -> Tensor:
    """LongTensor [N]: the row that each target lies in."""
    return (batch.targets != IGNORED).nonzero()[:, 0]


def answer_logprobs(model: Qwen3, batch: Pairs) -> Tensor:
    """log p of each row's answer, the sum over its tokens: float32 [B]."""
    losses = target_losses(model, batch, "none")
    return losses.new_zeros(len(batch.ids)).index_add(0, rows_of(batch), -losses)


class Objective(nn.Module):
    """A model together with its loss, a batch -> float32 []: the module that DDP and FSDP wrap.

    `measured` accumulates other metrics until they are taken: name -> [sum, number].
    """

    def __init__(self, model: Qwen3):
        super().__init__()
        self.model = model
        self.measured: dict[str, list[float]] = {}

    def forward(self, batch: Batch) -> Tensor:
        return next_token_loss(self.model, batch)

    def hidden_states(self, batch: Batch | Pairs | Rollouts) -> Tensor:
        """The model's, without the head: [B, T, C]."""
        return self.model.model(batch.ids, mask=batch.mask)

    def measure(self, **values: Iterable) -> None:
        for name, given in values.items():
            tensor, held = torch.as_tensor(given).float(), self.measured.setdefault(name, [0.0, 0.0])
            held[0], held[1] = held[0] + float(tensor.sum()), held[1] + tensor.numel()

    def take_measured(self) -> dict[str, list[float]]:
        taken, self.measured = self.measured, {}
        return taken


class DPO(Objective):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290, equation 7).

    margin = beta · [(log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))]
    loss   = -log sigmoid(margin) + nll · (-log π(chosen) / tokens of chosen)

    The second term keeps the chosen answers likely (https://arxiv.org/abs/2404.19733, equation 2).
    """

    def __init__(self, model: Qwen3, beta: float, nll: float = 0.0):
        super().__init__(model)
        self.beta, self.nll = beta, nll

    def forward(self, batch: Pairs) -> Tensor:
        logprobs = answer_logprobs(self.model, batch)
        ratios = logprobs - batch.reference
        margins = self.beta * (ratios[0::2] - ratios[1::2])
        loss = -F.logsigmoid(margins).sum()
        if self.nll:
            loss = loss - self.nll * (logprobs / (batch.targets != IGNORED).sum(1))[0::2].sum()
        self.measure(margin=margins.detach(), accuracy=margins.detach() > 0)
        return loss


class GRPO(Objective):
    """Group relative policy optimisation (https://arxiv.org/abs/2402.03300, equations 3 and 4).

    For each token, with r = π/π_old and A the advantage of its reply:
    loss = -min(r·A, clip(r, 1 - clip, 1 + clip_high)·A) + kl · (π_ref/π - log(π_ref/π) - 1)

    An upper limit of its own is DAPO's (https://arxiv.org/abs/2503.14476, section 3.1). Every probability is that of
    sampling at `temperature`.
    """

    def __init__(self, model: Qwen3, clip: float, clip_high: float, kl: float, temperature: float = 1.0):
        super().__init__(model)
        self.clip, self.clip_high, self.kl, self.temperature = clip, clip_high, kl, temperature

    def logprobs(self, batch: Rollouts, model: Qwen3 | None = None) -> Tensor:
        """float32 [N], of the trained model or another."""
        return -target_losses(model or self.model, batch, "none", self.temperature)

    def forward(self, batch: Rollouts) -> Tensor:
        logprobs, rows = self.logprobs(batch), rows_of(batch)
        advantages = batch.advantages[rows]
        ratio = (logprobs - (logprobs.detach() if batch.old is None else batch.old)).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        self.measure(clip_fraction=(clipped * advantages < ratio * advantages).detach())
        if batch.reference is not None:
            log_ratio = batch.reference - logprobs
            kl = log_ratio.exp() - log_ratio - 1  # unbiased and never negative (http://joschu.net/blog/kl-approx.html)
            losses = losses + self.kl * kl
            self.measure(kl=kl.detach())
        return (losses * batch.shares[rows]).sum()


def advantages(rewards: Tensor, group: int, divide_by_std: bool) -> Tensor:
    """Each reply's reward minus the mean of its group, over the group's standard deviation (GRPO, section 4.1.2).

    rewards [B], the replies to one prompt side by side -> [B]. Without the division, a question
    counts by the spread of its rewards (Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.1).
    """
    groups = rewards.view(-1, group)
    above = groups - groups.mean(1, keepdim=True)
    return (above / (groups.std(1, keepdim=True) + 1e-4) if divide_by_std else above).flatten()
