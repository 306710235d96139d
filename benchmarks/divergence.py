"""How far a model's logits are from those of the same weights in float32, over unseen questions with their replies."""

import http.client
import json
from pathlib import Path

import torch

from benchmarks.server import Server
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


def llama_logits(program: str, gguf: Path, texts: list[list[int]], vocabulary: int) -> torch.Tensor:
    """[all tokens, V] of llama-server, each position's mean taken away: it gives log probabilities, all of them."""
    context = max(map(len, texts)) + 16
    command = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}", "--parallel", "1"]
    found = torch.empty(sum(map(len, texts)), vocabulary)
    with Server([*command, "--ctx-size", str(context), "--no-webui"], "/health") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        prompts = (ids[: end + 1] for ids in texts for end in range(len(ids)))
        for row, prompt in zip(found, prompts, strict=True):
            body = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0, "cache_prompt": True}
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            said = json.loads(reply.read())
            if reply.status != 200:
                raise ValueError(f"{program}: {said}")
            tokens = said["completion_probabilities"][0]["top_logprobs"]
            if len(tokens) != vocabulary:
                raise ValueError(f"{program} gave {len(tokens)} of {vocabulary} log probabilities")
            row[[token["id"] for token in tokens]] = torch.tensor([token["logprob"] for token in tokens])
        connection.close()
    return found - found.mean(-1, keepdim=True)


def beside_llama(program: str, gguf: Path, texts: list[list[int]]) -> tuple[float, float]:
    """Relative errors of the logits of a file beside its own numbers in float32, by PyTorch: ours and llama.cpp's."""
    exact = logits(Qwen3.from_pretrained(gguf, dtype=torch.float32), texts)
    theirs = compare(llama_logits(program, gguf, texts, exact.shape[-1]), exact)[0]
    return compare(logits(Qwen3.from_pretrained(gguf), texts), exact)[0], theirs
