"""Losses of the stages against the formulas of their papers, written out densely in float64."""

import pytest
import torch
from torch import Tensor

from data.packing import dealt, packed
from data.sources import Row
from model import Config, Qwen3
from ops import cross_entropy
from ops.cross_entropy import linear_cross_entropy
from training.batches import batches, packed_batch, real_lengths
from training.objectives import DPO, GRPO, IGNORED, Batch, Pairs, Rollouts, advantages, next_token_loss, target_losses

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
LENGTHS = (5, 9, 3, 8)  # of the answers, each behind a prompt of two tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request) -> Qwen3:
    torch.manual_seed(1)
    return Qwen3(Config(vocab_size=31, **SIZES, tie_word_embeddings=request.param))


@pytest.fixture
def answers() -> tuple[Tensor, Tensor]:
    """ids and targets of four answers of different lengths."""
    torch.manual_seed(2)
    ids, targets = torch.randint(31, (4, 12)), torch.full((4, 12), IGNORED)
    for row, length in enumerate(LENGTHS):
        targets[row, 1 : 1 + length] = ids[row, 2 : 2 + length]
    return ids, targets


def dense_logprobs(model: Qwen3, ids: Tensor, targets: Tensor, temperature: float = 1.0) -> list[Tensor]:
    """log p of each row's targets from whole logits in float64, a row at a time."""
    logprobs = (model(ids).double() / temperature).log_softmax(-1)
    found = []
    for row in range(len(ids)):
        places = (targets[row] != IGNORED).nonzero()[:, 0]
        found.append(logprobs[row, places, targets[row, places]])
    return found


def assert_same(loss: Tensor, expected: Tensor, model: Qwen3) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    found, wanted = torch.autograd.grad(loss, weights, retain_graph=True), torch.autograd.grad(expected, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_single_losses_and_their_gradients_are_those_of_the_whole(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(23, 12).requires_grad_(), torch.randn(50, 12).requires_grad_()
    targets, shares = torch.randint(50, (23,)), torch.randn(23)
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")
    found = linear_cross_entropy(x, weight, targets, chunk, "none")
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((losses.exp() * shares).sum(), (x, weight)) for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 5), (torch.bfloat16, 10)])
def test_logits_take_no_more_memory_at_once_than_they_may(dtype, rows, monkeypatch):
    sizes, errors = [], cross_entropy._errors
    monkeypatch.setattr(
        cross_entropy, "_errors", lambda logits, *rest: sizes.append(len(logits)) or errors(logits, *rest)
    )
    x, weight, targets = torch.randn(23, 12, dtype=dtype), torch.randn(50, 12, dtype=dtype), torch.randint(50, (23,))
    for limit, expected in ((5 * 50 * 4, [rows] * (23 // rows) + [3]), (1, [1] * 23)):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", {"cpu": limit})
        sizes.clear()
        linear_cross_entropy(x, weight, targets)
        assert sizes == expected


def test_a_batch_without_lengths_has_no_padding(answers):
    assert real_lengths(Batch(*answers)).tolist() == [12] * 4
    assert real_lengths(Batch(*answers, lengths=torch.tensor([7, 11, 5, 10]))).tolist() == [7, 11, 5, 10]


def test_frozen_head(model, answers):
    """Adapters leave the head as it is; only the hidden states need gradients."""
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    losses = target_losses(model, Batch(*answers), "none")
    expected = -torch.cat(dense_logprobs(model, *answers))
    both = [torch.autograd.grad(each.exp().sum(), model.model.norm.weight)[0].float() for each in (losses, expected)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_dpo(model, answers, nll):
    reference = torch.tensor([-10.0, -20.0, -15.0, -30.0])
    objective = DPO(model, beta=0.3, nll=nll)
    pairs = Pairs(*answers, reference)
    loss = objective(pairs)
    assert pairs.count == 2 and pairs._replace(ids=pairs.ids[:2]).count == 1  # what a step divides its loss by
    logprobs = dense_logprobs(model, *answers)
    expected, margins = torch.zeros((), dtype=torch.float64), []
    for chosen, rejected in ((0, 1), (2, 3)):
        ratio = logprobs[chosen].sum() - reference[chosen] - (logprobs[rejected].sum() - reference[rejected])
        margins.append(0.3 * ratio.detach())
        expected = expected - torch.log(1 / (1 + torch.exp(-0.3 * ratio))) - nll * logprobs[chosen].mean()
    assert_same(loss, expected, model)
    measured = objective.take_measured()
    assert measured["margin"] == pytest.approx([float(sum(margins)), 2])
    assert measured["accuracy"] == [sum(float(margin) > 0 for margin in margins), 2]
    assert objective.take_measured() == {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpo(model, answers, temperature):
    """Some ratios are beyond the limits on either side, with advantages of either sign."""
    torch.manual_seed(3)
    weights, shares = torch.tensor([1.0, -0.5, 0.8, -1.2]), torch.tensor([1 / n for n in LENGTHS])
    logprobs = dense_logprobs(model, *answers, temperature)
    now = torch.cat(logprobs).detach().float()
    old, reference = now + 0.4 * torch.randn(len(now)), now + 0.5 * torch.randn(len(now))
    objective = GRPO(model, clip=0.2, clip_high=0.3, kl=0.05, temperature=temperature)
    loss = objective(Rollouts(*answers, weights, shares, 4, old, reference))
    expected, at, clipped, divergence = torch.zeros((), dtype=torch.float64), 0, 0, 0.0
    for row, length in enumerate(LENGTHS):
        for place in range(length):
            log_p, log_old, log_ref = logprobs[row][place], old[at].double(), reference[at].double()
            ratio, at = torch.exp(log_p - log_old), at + 1
            limited = torch.clip(ratio, 0.8, 1.3)
            kl = torch.exp(log_ref) / torch.exp(log_p) - torch.log(torch.exp(log_ref) / torch.exp(log_p)) - 1
            gain = torch.min(ratio * weights[row], limited * weights[row])
            expected = expected - (gain - 0.05 * kl) / length
            clipped += bool((ratio > 1.3) & (weights[row] > 0)) or bool((ratio < 0.8) & (weights[row] < 0))
            divergence += float(kl.detach())
    assert_same(loss, expected, model)
    measured = objective.take_measured()
    assert measured["clip_fraction"] == [clipped, sum(LENGTHS)] and 0 < clipped < sum(LENGTHS)
    assert measured["kl"] == pytest.approx([divergence, sum(LENGTHS)], rel=1e-4)


def test_without_old_logprobs_the_first_update_is_the_policy_gradient(model, answers):
    weights, shares = torch.tensor([1.0, -0.5, 0.8, -1.2]), torch.ones(4)
    loss = GRPO(model, 0.2, 0.2, 0.0)(Rollouts(*answers, weights, shares, sum(LENGTHS)))
    rows = zip(dense_logprobs(model, *answers), weights, strict=True)
    expected = -sum((logprobs.exp() / logprobs.exp().detach()).sum() * weight for logprobs, weight in rows)
    assert_same(loss, expected, model)


def test_advantages_are_taken_within_each_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1])
    found = advantages(rewards, 4, divide_by_std=True)
    std = (4 * 0.25 / 3) ** 0.5
    torch.testing.assert_close(found, torch.tensor([1, -1, -1, 1, 0, 0, 0, 0]) * 0.5 / (std + 1e-4))
    assert advantages(rewards, 4, divide_by_std=False).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]


# --- packing ---


def conversations(count: int) -> list[Row]:
    torch.manual_seed(4)
    rows = []
    for length in torch.randint(2, 20, (count,)).tolist():
        ids = torch.randint(31, (length + 1,)).tolist()
        rows.append(Row(ids[:-1], [IGNORED] * (length // 2) + ids[1 + length // 2 :]))
    return rows


def test_packed_rows_have_the_loss_of_rows_by_themselves(model):
    rows, device = conversations(13), torch.device("cpu")
    alone = sum(next_token_loss(model, batch) for row in rows for batch in batches([row], 1, device))
    together = [packed_batch(part, device) for part in dealt(packed(rows, 24), 2, 1, 0)]
    assert len(together) == 2 and sum(len(batch.ids) for batch in together) < len(rows)
    assert sum(batch.count for batch in together) == sum(t != IGNORED for row in rows for t in row.targets)
    assert_same(sum(next_token_loss(model, batch) for batch in together), alone.double(), model)
    unmasked = sum(next_token_loss(model, batch._replace(mask=None)) for batch in together)
    assert abs(float((unmasked - alone).detach())) > 1e-2  # else this test would see nothing


END = 2  # precedes each document


def as_batches(documents: list[list[int]], way: str, parts: int) -> list[Batch]:
    """One sequence a document, or several in one: packed as rows, or as the text of a shard with a mask."""
    device = torch.device("cpu")
    texts = [[END, *document, END] for document in documents]
    rows = [Row(text[:-1], text[1:]) for text in texts]
    if way == "packed":
        return [packed_batch(part, device) for part in dealt(packed(rows, 20), parts, 1, 0)]
    if way == "masked":  # a shard is one text: what follows a document is the next one's end token
        halves = [[token for text in texts[half::2] for token in text[:-1]] + [END] for half in (0, 1)]
        rows = [Row(half[:-1], half[1:]) for half in halves]
    return batches(rows, parts, device, END if way == "masked" else None)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Documents; a checkpoint; the mean loss and the gradients that transformers gives, each document by itself."""
    from oracle import config, write  # here, since it imports transformers

    path = tmp_path_factory.mktemp("reference")
    theirs = write(path, config(tie_word_embeddings=True))
    torch.manual_seed(5)
    documents = [torch.randint(3, 331, (length,)).tolist() for length in (9, 4, 1, 14, 7, 4, 11)]
    total, count = torch.zeros(()), 0
    for document in documents:
        ids = torch.tensor([[END, *document, END]])
        count += len(document) + 1
        total = total + theirs(input_ids=ids, labels=ids).loss * (len(document) + 1)
    (total / count).backward()
    return documents, path, float(total.detach() / count), {name: p.grad for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("way", ["padded", "packed", "masked"])
def test_a_step_has_the_loss_and_gradients_of_transformers_row_by_row(reference, way, parts):
    documents, path, expected, gradients = reference
    model, made = Qwen3.from_pretrained(path).train(), as_batches(documents, way, parts)
    count, total = sum(batch.count for batch in made), 0.0
    assert count == sum(len(document) + 1 for document in documents)
    assert len(made) == min(parts, {"padded": 7, "packed": 3, "masked": 2}[way])
    for batch in made:
        loss = next_token_loss(model, batch)
        (loss / count).backward()
        total += float(loss.detach())
    assert total / count == pytest.approx(expected, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_step_in_bfloat16_is_near_transformers_in_float32(reference):
    documents, path, expected, gradients = reference
    model, (batch,) = Qwen3.from_pretrained(path).train(), as_batches(documents, "packed", 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, batch) / batch.count
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=5e-3)
    for name, p in model.named_parameters():
        assert torch.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), dim=0) > 0.99, name


def test_every_row_is_packed_once_and_none_is_cut():
    rows = sorted(conversations(50), key=lambda row: -row.length)
    sequences = packed(rows, 20)
    assert sorted(id(row.ids) for rows in sequences for row in rows) == sorted(id(row.ids) for row in rows)
    assert all(sum(row.length for row in rows) <= 20 for rows in sequences)
    assert len(sequences) <= 1.25 * sum(row.length for row in rows) / 20 + 1
