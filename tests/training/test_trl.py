"""The losses of the stages held against TRL's on the same batch, where trl is installed (it brings torch's trainers).

pip install trl peft
"""

import pytest
import torch
from torch import Tensor

from data.corpus.tokenizer import TINY
from model import Qwen3
from training.objectives import DPO, GRPO, IGNORED, Batch, Objective, Pairs, Rollouts, advantages, answer_logprobs

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.usefixtures("one_thread")
USUAL = {"report_to": "none", "use_cpu": True, "bf16": False, "logging_strategy": "no", "gradient_checkpointing": False}
GRADIENT = "model.layers.1.mlp.up_proj.weight"


def theirs(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def data_set(rows: list[dict]):
    from datasets import Dataset

    return Dataset.from_list(rows)


@pytest.fixture
def moved(tmp_path):
    """A checkpoint whose weights are a step away from the bundled model's."""
    model = Qwen3.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * p.data.std().nan_to_num(0.0) * torch.randn_like(p)
    model.save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def shifted(ids: Tensor, learnt: Tensor) -> Tensor:
    """Targets of ids [B, T], the next token wherever that one is learnt."""
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = torch.where(learnt[:, 1:].bool(), ids[:, 1:], IGNORED)
    return targets


def assert_same(loss: Tensor, ours: Qwen3, expected: Tensor, other) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    wanted = dict(other.named_parameters())[GRADIENT].grad
    torch.testing.assert_close(
        ours.get_parameter(GRADIENT).grad, wanted, rtol=1e-2, atol=1e-4 * float(wanted.abs().max())
    )


ANSWERS = ("It is 7.", "I do not know what that is, but I like it.", "Yes", "473 + 89 = 562.")


def test_sft(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + 3?"}],
            "completion": [{"role": "assistant", "content": a}],
        }
        for n, a in enumerate(ANSWERS)
    ]
    config = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=4, **USUAL)
    trainer = trl.SFTTrainer(theirs(TINY), config, train_dataset=data_set(rows), processing_class=tokenizer())
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(inputs))
    ours = Qwen3.from_pretrained(TINY, dtype=torch.float32)
    batch = Batch(inputs["input_ids"], shifted(inputs["input_ids"], inputs["labels"] != IGNORED))
    assert 0 < batch.count < inputs["attention_mask"].sum()
    assert_same(Objective(ours)(batch) / batch.count, ours, expected, trainer.model)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(tmp_path, moved, beta):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + 3?"}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}],
        }
        for n, (a, b) in enumerate(zip(ANSWERS, ANSWERS[1:] + ANSWERS[:1], strict=True))
    ]
    config = trl.DPOConfig(str(tmp_path), beta=beta, per_device_train_batch_size=4, **USUAL)
    trainer = trl.DPOTrainer(
        theirs(moved), theirs(TINY), config, train_dataset=data_set(rows), processing_class=tokenizer()
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(inputs))
    order = torch.arange(8).view(2, 4).T.flatten()  # theirs has all chosen ones first
    ids = inputs["input_ids"][order]
    batch = Pairs(ids, shifted(ids, inputs["completion_mask"][order]), torch.zeros(8))
    with torch.no_grad():
        reference = answer_logprobs(Qwen3.from_pretrained(TINY, dtype=torch.float32), batch)
    ours = Qwen3.from_pretrained(moved, dtype=torch.float32)
    assert_same(DPO(ours, beta)(batch._replace(reference=reference)) / 4, ours, expected, trainer.model)


@pytest.mark.parametrize(("loss_type", "average"), [("grpo", "reply"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_grpo(tmp_path, moved, loss_type, average):
    """Their bnpo is DAPO's mean over the tokens of a batch, where the batch is all there is."""
    config = trl.GRPOConfig(
        str(tmp_path),
        beta=0.05,
        epsilon=0.2,
        epsilon_high=0.3,
        loss_type=loss_type,
        use_bias_correction_kl=False,  # their default is DeepSeek-V3.2's, not the paper's
        temperature=0.7,
        num_generations=4,
        max_completion_length=24,
        per_device_train_batch_size=4,
        **USUAL,
    )
    data = data_set([{"prompt": "x"}] * 4)
    trainer = trl.GRPOTrainer(
        theirs(moved), lambda **given: [0.0], config, train_dataset=data, processing_class=tokenizer()
    )
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(1)
    prompts, lengths = torch.randint(300, 600, (4, 5)), (6, 11, 3, 9)
    replies = torch.randint(300, 600, (4, 11))
    kept = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    ids = torch.cat((prompts, replies), 1)
    targets = shifted(ids, torch.cat((torch.zeros_like(prompts), kept), 1))
    share = {"reply": [1 / n for n in lengths], "token": [1.0] * 4, "constant": [1 / 24] * 4}[average]
    weights = advantages(torch.tensor([1.0, 0.0, 0.1, 1.1]), 4, divide_by_std=True)
    batch = Rollouts(ids, targets, weights, torch.tensor(share), sum(lengths) if average == "token" else 4)
    ours = Qwen3.from_pretrained(moved, dtype=torch.float32)
    objective = GRPO(ours, clip=0.2, clip_high=0.3, kl=0.05, temperature=0.7)
    with torch.no_grad():
        now, reference = objective.logprobs(batch), objective.logprobs(batch, Qwen3.from_pretrained(TINY).float())
    old = now + 0.3 * torch.randn(len(now))
    loss = objective(batch._replace(old=old, reference=reference)) / batch.count

    def spread(flat: Tensor) -> Tensor:
        return torch.zeros(4, 11).masked_scatter(kept, flat)

    inputs = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": replies}
    inputs |= {"completion_mask": kept.long(), "advantages": weights, "old_per_token_logps": spread(old)}
    inputs |= {"ref_per_token_logps": spread(reference), "num_items_in_batch": kept.sum()}
    assert_same(loss, ours, trainer._compute_loss(trainer.model, inputs), trainer.model)
