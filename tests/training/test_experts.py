"""Mixtures of experts in training: transformers' balance loss, and the same losses in any number of processes."""

import pytest
import torch
import yaml
from oracle import MOE, config, write
from runs import CONFIG, in_processes, metrics, run
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from model import Qwen3
from ops.quant import quantize_
from training.balance import Balance
from training.batches import IGNORED, Batch
from training.lora import add_lora
from training.objectives import Objective
from training.processes import Processes
from training.reporting import flops_per_token

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(lengths: list[int]) -> Batch:
    torch.manual_seed(3)
    ids = torch.randint(331, (len(lengths), max(lengths)))
    targets = ids.roll(-1, 1)
    for row, length in enumerate(lengths):
        ids[row, length:], targets[row, length:] = 0, IGNORED
    return Batch(ids, targets, lengths=torch.tensor(lengths))


def gradients(model: Qwen3, batches: list[Batch], coefficient: float) -> tuple[dict[str, torch.Tensor], float]:
    """Of the mean loss and the balance loss over the batches; and the balance loss."""
    model.zero_grad()
    objective = Objective(model)
    balance = Balance(objective, coefficient, Processes("none", "cpu"))
    count, tokens = sum(each.count for each in batches), sum(int(each.lengths.sum()) for each in batches)
    balance.begin(batches, tokens)
    for each in batches:
        (objective(each) / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, balance.loss()


@pytest.mark.parametrize("cut", [1, 3], ids=["one micro-batch", "three"])
def test_the_balance_loss_and_its_gradient_are_those_of_transformers(tmp_path, cut):
    """Over all real tokens of a step, however it is cut. A layer without experts has no share in it."""
    theirs = write(tmp_path, config(**MOE | {"mlp_only_layers": [1]}))
    whole = batch([11, 7, 5])
    mask = (torch.arange(11) < whole.lengths[:, None]).long()
    out = theirs.model(whole.ids, attention_mask=mask, output_router_logits=True)
    aux = load_balancing_loss_func(out.router_logits, 8, 3, mask)
    taught = whole.targets != IGNORED
    logits = theirs.lm_head(out.last_hidden_state)[taught]
    (torch.nn.functional.cross_entropy(logits, whole.targets[taught]) + 0.5 * aux).backward()

    rows = [Batch(whole.ids[i : i + 1], whole.targets[i : i + 1], None, whole.lengths[i : i + 1]) for i in range(3)]
    parts = [whole] if cut == 1 else rows
    ours = Qwen3.from_pretrained(tmp_path).train()
    found, loss = gradients(ours, parts, 0.5)
    assert loss == pytest.approx(aux.item(), rel=1e-6)
    router = "model.layers.0.mlp.gate.weight"
    expected = dict(theirs.named_parameters())[router].grad
    torch.testing.assert_close(found[router], expected, rtol=1e-4, atol=1e-6)
    embedding = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedding, rtol=1e-3, atol=1e-5)
    without, _ = gradients(Qwen3.from_pretrained(tmp_path).train(), parts, 0.0)
    assert (found[router] - without[router]).abs().max() > 1e-3


def test_recomputed_activations_are_counted_once(tmp_path):
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    write(tmp_path, config(**MOE))
    expected, loss = gradients(Qwen3.from_pretrained(tmp_path).train(), [batch([9, 4])], 0.3)
    model = Qwen3.from_pretrained(tmp_path).train()
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    found, again = gradients(model, [batch([9, 4])], 0.3)
    assert again == loss
    torch.testing.assert_close(found, expected)


def test_every_expert_has_a_gradient_and_inference_runs_the_chosen_ones_alone(tmp_path):
    write(tmp_path, config(**MOE | {"num_experts": 32}))
    model = Qwen3.from_pretrained(tmp_path).train()
    model(torch.tensor([[5, 6]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    calls = []
    for expert in model.model.layers[0].mlp.experts:
        expert.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert 3 <= len(calls) <= 6


@pytest.fixture
def sparse(tmp_path):
    """Eight steps of a model most of whose experts get no token in a step."""
    sizes = CONFIG["model"]["config"] | {"model_type": "qwen3_moe", "num_experts": 24, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 8, "norm_topk_prob": True, "router_aux_loss_coef": 0.02}
    changed = {"model": CONFIG["model"] | {"config": sizes}, "train": CONFIG["train"] | {"steps": 6, "save_every": 3}}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changed))
    return path


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp", "muon")])
def test_two_processes_give_the_losses_of_one(sparse, parallel, optimizer):
    chosen = ["train.accumulate=4", f"optimizer.name={optimizer}", "train.validate_batches=1"]
    alone = run(sparse, *chosen)
    (sparse.parent / "run").rename(sparse.parent / "alone")
    assert in_processes(2, run, sparse, *chosen, f"train.parallel={parallel}") == [0, 0]
    for record, expected in zip(metrics(sparse.parent / "run"), alone, strict=True):
        for name in ("loss", "router_aux_loss", "tokens"):
            assert record[name] == pytest.approx(expected[name], rel=1e-5)


def test_operations_are_those_of_what_is_used_and_trained(tmp_path):
    write(tmp_path, config(**MOE))
    model, hidden, heads = Qwen3.from_pretrained(tmp_path), 48, 4 * 16
    attention = hidden * (heads + 2 * 2 * 16) + heads * hidden
    active = attention + hidden * 8 + 3 * 3 * hidden * 40  # router, and three experts of eight
    head = 331 * hidden
    assert flops_per_token(model) == (6 * (3 * active + head), 12 * 3 * heads)
    add_lora(model, 2, 4.0, ["q_proj"], 0)
    adapters = 3 * 2 * (hidden + heads)
    assert flops_per_token(model)[0] == 4 * (3 * active + head) + 6 * adapters
    write(tmp_path / "dense", config(hidden_size=64, head_dim=16))
    dense = Qwen3.from_pretrained(tmp_path / "dense").requires_grad_(False)
    before = flops_per_token(dense)
    quantize_(dense, "int8")
    assert flops_per_token(dense) == before
