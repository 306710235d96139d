"""The balance of a mixture of experts: without it, a router soon sends every token to the same few experts.

    loss = coefficient · E · Σᵢ fᵢ · Pᵢ

For expert i of E, fᵢ is how often a token in a layer chooses it and Pᵢ its mean probability, over all real tokens and
all sparse layers (Switch Transformers, https://arxiv.org/abs/2101.03961, equation 4; for several experts a token as in
transformers' load_balancing_loss_func). Both are those of a whole step, however it is cut into micro-batches and over
processes (as Qwen3 was trained: https://arxiv.org/abs/2501.11873). f has no gradient, but its value is needed before
the backward pass: several micro-batches get a forward pass first, without the head.

The gradient is added at the router's logits, so model.py needs no code for it (as in Megatron's MoEAuxLossAutoScaler).
"""

from typing import Any

import torch
from torch import Tensor, nn

from model import MoE
from training.batches import real_lengths
from training.objectives import Objective
from training.processes import Processes


class Balance:
    """Hooks on the routers of an objective's model. Call `begin` before a step's micro-batches are computed."""

    def __init__(self, objective: Objective, coefficient: float, processes: Processes):
        self.coefficient, self.processes = coefficient, processes
        self.objective, config = objective, objective.model.config
        self.top_k, self.experts = config.num_experts_per_tok, config.num_experts
        gates = [module.gate for module in objective.model.modules() if isinstance(module, MoE)]
        self.layers, self.tokens, self.counts = len(gates), 1.0, True
        self.sums = torch.zeros(2, self.experts, dtype=torch.float64, device=processes.device)  # of f and P
        self.real: Tensor | None = None  # bool [B·T]: the tokens of the current micro-batch that are no padding
        objective.register_forward_pre_hook(lambda module, given: self._enter(given[0]))
        objective.register_forward_hook(lambda *_: self._leave())
        for gate in gates:
            gate.register_forward_hook(self._routed)

    def begin(self, batches: list, tokens: float) -> None:
        """This process's micro-batches, and the step's number of real tokens over all processes."""
        self.tokens, self.counts = tokens * self.layers, True
        self.sums.zero_()
        if len(batches) == 1 and self.processes.count == 1:
            return  # its own forward pass counts, before its backward pass asks
        with torch.no_grad():
            for batch in batches:
                self._enter(batch)
                self.objective.hidden_states(batch)
        self._leave()
        self.processes.sum_tensor(self.sums)

    def loss(self) -> float:
        """The step's, without the coefficient: from top_k, where all experts are used equally, up to E."""
        frequency, probability = self.sums / self.tokens
        return self.experts * float((frequency * probability).sum())

    def _enter(self, batch: Any) -> None:
        length = batch.ids.shape[1]
        self.real = (torch.arange(length) < real_lengths(batch)[:, None]).flatten().to(batch.ids.device)

    def _leave(self) -> None:
        """Ends the count: what is recomputed in the backward pass is not counted again."""
        self.counts = False

    def _routed(self, gate: nn.Module, given: tuple, logits: Tensor) -> Tensor:
        if self.counts and self.real is not None:
            probabilities = logits.detach()[self.real].softmax(-1, dtype=torch.float32)
            chosen = probabilities.topk(self.top_k, -1).indices.flatten()
            self.sums[0] += chosen.bincount(minlength=self.experts)
            self.sums[1] += probabilities.sum(0, dtype=torch.float64)
        return _Balanced.apply(logits, self.real, self) if torch.is_grad_enabled() else logits


class _Balanced(torch.autograd.Function):
    """The identity on logits [N, E]; the backward pass adds the gradient of the balance loss."""

    @staticmethod
    def forward(context, logits: Tensor, real: Tensor, balance: Balance) -> Tensor:
        context.save_for_backward(logits, real)
        context.balance = balance
        return logits.view_as(logits)

    @staticmethod
    def backward(context, grad: Tensor):
        (logits, real), balance = context.saved_tensors, context.balance
        scale = balance.coefficient * balance.experts / balance.tokens * balance.processes.count
        slope = (balance.sums[0] / balance.tokens * scale).float()  # of the loss in each token's probabilities
        probabilities = logits.softmax(-1, dtype=torch.float32)
        added = probabilities * (slope - (probabilities * slope).sum(-1, keepdim=True))
        return grad + added.mul_(real[:, None]).to(grad.dtype), None, None
