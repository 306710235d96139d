"""benchmarks/train.py's second peer: nanoGPT's model in the loop of train_transformers.py.

Written after the description of GPT-2 in nanoGPT (https://github.com/karpathy/nanoGPT, model.py and train.py), whose
choices it has: learned positions, LayerNorm without bias, one matrix for queries, keys and values, attention by
`scaled_dot_product_attention`, an MLP four times as wide with GELU, the head tied to the embedding, no dropout, initial
values of std 0.02 (those of the layers' outputs divided by the root of twice the number of layers), cross-entropy on
all logits at once. Where NANOGPT names a checkout of nanoGPT, its own model.py is measured instead.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_transformers import Measured

from benchmarks.train import Job, PeerRows, measure


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]"""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(C, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """ids, targets [B, T] -> the mean cross-entropy, float32 []."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(
                    weight, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Published(nn.Module):
    """The model of a checkout of nanoGPT."""

    def __init__(self, checkout: str, vocabulary: int, context: int, width: int, layers: int, heads: int):
        super().__init__()
        spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["nanogpt"] = module  # torch.compile imports it by name
        spec.loader.exec_module(module)
        sizes = {"vocab_size": vocabulary, "block_size": context, "n_embd": width, "n_layer": layers, "n_head": heads}
        self.model = module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=False))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(ids, targets)[1]


def speed(job: Job) -> Measured:
    settings = PeerRows(job.config).settings
    shape = json.loads((Path(settings.model.init) / "config.json").read_text())
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = [shape[name] for name in names]
    torch.manual_seed(settings.train.seed)
    checkout = os.environ.get("NANOGPT")
    sys.stdout = sys.stderr  # the published model prints its size
    return Measured(job, Published(checkout, *sizes) if checkout else GPT(*sizes))


if __name__ == "__main__":
    out = sys.stdout  # `speed` replaces it, and Python flushes only the present one at its end
    print(
        json.dumps(measure(speed, Job(**json.loads(sys.argv[2])))), file=out, flush=True
    )  # it is no longer sys.stdout
