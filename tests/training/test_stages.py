"""Runs of sft on foreign rows, dpo, grpo and lora: what they learn, and that a killed one resumes bit-identical."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from runs import CONFIG, Fault, in_child, in_processes, kill, metrics, run, run_with_equal_weights, settings

import train
from chat import Chat
from data.corpus.examples import HARD, check, hard_examples, is_test, question_example, training_example
from data.corpus.preferences import preference_example
from data.corpus.talk import is_refusal
from data.corpus.tokenizer import TINY, pieces_of
from data.sources import WrittenRows
from inference.decode import end_tokens
from inference.replies import parse
from model import Qwen3
from training.rewards import reward
from training.stages import Steady

PIECES = pieces_of(TINY)
STAGES = {
    "sft": ["data.source=rows", "data.pack=true", "train.validate_batches=1"],
    "dpo": ["data.source=corpus", "data.train=null", "dpo.nll=0.1", "train.validate_batches=1"],
    "grpo": ["data.source=rows", "grpo.thinking=false", "train.batch=16", "grpo.group=4", "grpo.max_new_tokens=20"],
}
STAGES["grpo"] += ["grpo.updates=2", "grpo.rollout_batch=12", "data.validation=null"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path) -> Path:
    """Four steps from the bundled model, and seven rows of Dolly's shape which are GSM8K's too."""
    rows = [{"instruction": f"Say {n}", "context": "please", "response": n * "so "} for n in range(1, 8)]
    rows = [row | {"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n, row in enumerate(rows, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {"train": CONFIG["train"] | {"steps": 4, "save_every": 2}, "optimizer": {"name": "adamw", "lr": 3e-3}}
    changed |= {
        "data": {"source": "rows", "train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")}
    }
    changed |= {"model": {"init": str(TINY), "tokenizer": str(TINY)}}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changed))
    return path


def without_speed(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


def killed_at(step: int, config: Path, *overrides: str) -> None:
    assert in_child(run, config, *overrides, fault=Fault(step, kill)) == -signal.SIGKILL


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return Qwen3.from_pretrained(checkpoint).state_dict()


LORA = ["lora.rank=3", "train.dtype=bfloat16"]


@pytest.mark.parametrize(("stage", "lora"), [("sft", LORA), ("dpo", []), ("grpo", []), ("grpo", LORA)])
def test_killed_and_resumed_is_equal_to_the_bit(config, stage, lora):
    """After step 3, one past a checkpoint; all that a stage draws, computes once or copies is as it was."""
    chosen, out = [f"stage={stage}", *STAGES[stage], *lora], config.parent / "run"
    whole = without_speed(run(config, *chosen))
    out.rename(config.parent / "unbroken")
    killed_at(4, config, *chosen)
    assert [record["step"] for record in metrics(out)] == [1, 2, 3]
    assert without_speed(run(config, *chosen, resume=True)) == whole
    before, after = weights(config.parent / "unbroken" / "latest"), weights(out / "latest")
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = weights(TINY)
    assert any(not torch.equal(start[name].float(), after[name].float()) for name in after)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_base_model_learns_to_end_its_turns(config, tmp_path, stage):
    """Its tokenizer's eos_token ends documents; the template ends turns, and so does every reply from then on."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    changes = {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "generation_config": {"eos_token_id": 732}}
    for name, change in (changes | {"config": {"eos_token_id": 732}}).items():
        path = base / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    chat = Chat.from_pretrained(base)
    assert (chat.eos_token_id, chat.end_of_turn_id) == (732, 734)
    (row,) = WrittenRows(chat).conversation({"prompt": "Hi", "completion": "Hello!"})
    assert row.targets[-1] == 734
    chosen = [f"stage={stage}", *STAGES[stage], f"model.init={base}", f"model.tokenizer={base}", "train.steps=1"]
    records = run(config, *chosen)
    latest = config.parent / "run" / "latest"
    assert json.loads((latest / "generation_config.json").read_text())["eos_token_id"] == [734, 732]
    assert end_tokens(Qwen3.from_pretrained(latest)) == {732, 734}
    assert stage == "sft" or records[0]["format_errors"] < 0.5  # replies that the model ends by 734


def test_sft_on_rows_learns_them(config):
    records = run(config, *STAGES["sft"], "train.steps=30", "train.save_every=30")
    assert records[-1]["validation_loss"] < 0.2 * records[0]["loss"]


def test_packing_changes_the_speed_alone(config):
    """A step has the same conversations, packed or not, and the mean over their targets."""
    packed = run(config, *STAGES["sft"], "train.accumulate=1")
    (config.parent / "run").rename(config.parent / "packed")
    single = run(config, *STAGES["sft"], "train.accumulate=1", "data.pack=false")
    assert [r["loss"] for r in packed] == pytest.approx([r["loss"] for r in single], rel=1e-4)
    assert packed[-1]["tokens"] == single[-1]["tokens"]  # padding is not counted


def test_dpo_prefers_the_chosen_ones(config):
    records = run(config, "stage=dpo", *STAGES["dpo"], "train.steps=12", "train.save_every=12", "optimizer.lr=1e-3")
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[0]["loss"] == pytest.approx(0.693, abs=0.1)  # and the small loss of the chosen answers
    assert records[-1]["validation_accuracy"] >= 0.75 and records[-1]["validation_margin"] > 0.5


def test_resumed_dpo_needs_no_starting_weights(config, tmp_path):
    import shutil

    shutil.copytree(TINY, tmp_path / "start")
    chosen = ["stage=dpo", *STAGES["dpo"], f"model.init={tmp_path / 'start'}"]
    killed_at(4, config, *chosen)
    shutil.rmtree(tmp_path / "start")
    assert len(run(config, *chosen, resume=True)) == 4


def test_other_starting_weights_are_refused(config, tmp_path):
    """Adapters are nothing without the weights that they adapt."""
    import shutil

    shutil.copytree(TINY, tmp_path / "start")
    chosen = [*STAGES["sft"], "lora.rank=3", f"model.init={tmp_path / 'start'}"]
    killed_at(4, config, *chosen)
    model = Qwen3.from_pretrained(tmp_path / "start")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"model\.fingerprint: '\w+' -> '\w+'"):
        run(config, *chosen, resume=True)


def test_other_rows_are_refused(config):
    killed_at(4, config, *STAGES["sft"])
    with (config.parent / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(ValueError, match=r"data\.fingerprint: '\w+' -> '\w+'"):
        run(config, *STAGES["sft"], resume=True)


def test_grpo_raises_the_reward(config):
    chosen = ["train.batch=32", "train.steps=15", "train.save_every=15", "optimizer.lr=5e-4", "grpo.updates=1"]
    records = run(config, "stage=grpo", *STAGES["grpo"], *chosen)
    correct = [record["correct"] for record in records]
    assert sum(correct[-5:]) / 5 > sum(correct[:5]) / 5 + 0.15
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[-1]["kl"] > 0
    assert all(0 <= record["format_errors"] <= 1 and record["length"] > 0 for record in records)


@pytest.mark.parametrize(("stage", "parallel"), [("sft", "ddp"), ("dpo", "fsdp")])
def test_two_processes_give_the_losses_of_one(config, stage, parallel):
    chosen = [f"stage={stage}", *STAGES[stage], "optimizer.lr=3e-4", "train.steps=3"]
    alone = run(config, *chosen)
    (config.parent / "run").rename(config.parent / "alone")
    assert in_processes(2, run, config, *chosen, f"train.parallel={parallel}") == [0, 0]
    for record, expected in zip(metrics(config.parent / "run"), alone, strict=True):
        first = record["step"] == 1  # when all margins are 0 but for rounding, and so is their sign
        for name in ("loss", "margin") if first else ("loss", "margin", "accuracy"):
            assert record.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage=grpo", "train.batch=6", "grpo.group=4"], "train.batch 6 is no multiple of grpo.group 4"),
        (["stage=grpo", "grpo.group=2", "grpo.max_new_tokens=300"], "leaves no room for a prompt"),
        (["stage=pretrain", "data.source=rows"], "rows is for sft, dpo and grpo"),
        (["stage=dpo", "data.source=shards"], "shards has no conversations for stage dpo"),
        (["data.source=rows", "data.train=null"], "data.train must name the files"),
        (["stage=dpo", "data.pack=true"], "data.pack puts rows of pretrain and sft"),
        (["data.mask_documents=true"], "data.mask_documents keeps documents apart"),
        (["train.sequence=1025"], r"train\.sequence 1,025 is longer than the model's context of 1,024"),
        (["stage=dpo", "data.source=rows"], r"rows\.jsonl: line 1: .* a preference has chosen and rejected"),
        (["lora.rank=2", "lora.targets=[q_prj]"], "no linear layer q_prj; did you mean q_proj"),
        (["lora.rank=2", "optimizer.name=muon"], "muon is for whole matrices"),
        (["lora.rank=2", "lora.targets=[]"], "lora.targets is empty"),
        (["lora.rank=2", "lora.alpha=0"], "lora.alpha 0 multiplies what the adapters learn by 0"),
        (["lora.rank=2", "model.init=null", "model.config={}"], "lora adapts a trained model"),
        (["data.source=rows", "data.fingerprint=abc"], r"data\.fingerprint is abc, but the rows of"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, overrides, said):
    with pytest.raises(ValueError, match=said):
        run(config, *overrides)


def test_grpo_in_two_processes_and_resumed_in_one(config):
    """Each writes replies to its own questions; both then have the same weights. Resumed from the middle in one
    process, in smaller pieces and with recomputed activations, the run has the same replies and, to rounding, losses.
    """
    chosen = ["stage=grpo", *STAGES["grpo"], "optimizer.lr=3e-4"]
    assert in_processes(2, run_with_equal_weights, config, *chosen, "train.parallel=ddp") == [0, 0]
    first, latest = without_speed(metrics(config.parent / "run")), config.parent / "run" / "latest"
    assert len(first) == 4 and max(record["grad_norm"] for record in first) > 0
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000002")
    resumed = run(config, *chosen, "train.accumulate=16", "train.checkpoint_activations=true", resume=True)
    for record, expected in zip(without_speed(resumed), first, strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert record["tokens"] == expected["tokens"]


# --- replies and their rewards ---


@pytest.mark.parametrize("average", ["reply", "token", "constant"])
def test_what_the_losses_of_replies_are_divided_by(config, average):
    """The paper's mean over each reply's tokens, DAPO's over all tokens, Dr. GRPO's constant."""
    chosen = settings(config, "stage=grpo", *STAGES["grpo"], f"grpo.average={average}")
    stage = train.Trainer(chosen, resume=False).stage
    parts = stage.batches(0)
    assert [len(part.ids) for part in parts] == [8, 8]
    tokens = [(part.targets != -100).sum(1) for part in parts]
    shares, count = {"reply": (1 / torch.cat(tokens), 16), "constant": (torch.full((16,), 1 / 20), 16)}.get(
        average, (torch.ones(16), int(torch.cat(tokens).sum()))
    )
    assert torch.equal(torch.cat([part.shares for part in parts]), shares)
    assert sum(part.count for part in parts) == count
    assert sum(float(part.advantages.sum()) for part in parts) == pytest.approx(0, abs=1e-4)
    again = stage.batches(0)
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.old, b.old) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(stage.batches(1)[0].ids[:, :30], parts[0].ids[:, :30])


def test_the_pieces_of_prompts_do_not_depend_on_the_clock():
    pace, before = Steady(), [Steady().piece(decoding) for decoding in (True, False)]
    pace.measured(64, 9.0)
    pace.measured(1, 1e-6)
    assert [pace.piece(decoding) for decoding in (True, False)] == before


def test_parsed_replies():
    chat = Chat.from_pretrained(TINY)
    prompt, ends = chat.render([{"role": "user", "content": "Hi"}]), {chat.eos_token_id}

    def parsed(text: str, thinking: bool = True):
        return parse(chat, prompt, chat.encode(text), thinking, ends)

    whole = parsed("<think>\nHm.\n</think>\n\nIt is 3.<|im_end|>")
    assert (whole.thinking, whole.answer, whole.well_formed) == ("Hm.", "It is 3.", True)
    assert not parsed("<think>\nHm.\n</think>\n\nIt is 3.").well_formed
    assert not parsed("<think>\nIt is 3.<|im_end|>").well_formed and not parsed("<think>\nIt is 3.<|im_end|>").answer
    assert not parsed("It is 3.</think> It is 3.<|im_end|>").well_formed
    assert parsed("It is 3.<|im_end|>", thinking=False).well_formed
    assert not parse(chat, prompt, [], True, ends).well_formed
    assert reward(whole, lambda answer: "3" in answer, 0.1) == 1.1
    assert reward(whole, lambda answer: "4" in answer, 0.1) == 0.1
    assert reward(whole._replace(well_formed=False), lambda answer: True, 0.1) == 0.0


# --- the corpus of the later stages ---


def is_hard(problem) -> bool:
    """Beyond every size that supervised training has, told from the facts themselves."""
    facts = problem.facts
    return {
        "product": lambda: max(facts) >= 1000,
        "story": lambda: facts[1] >= 100,
        "weekday": lambda: facts[1] > 60,
    }.get(problem.family, lambda: False)()


def test_supervised_training_shows_no_hard_question():
    examples = [training_example(1, index, PIECES) for index in range(4000)]
    assert not any(is_hard(example.problem) for example in examples if example.problem)
    assert not any(is_refusal(example.answer) for example in examples)
    asked = [question_example(1, index, PIECES, 0.5, 0.2) for index in range(400)]
    posed = [example.problem for example in asked if example.problem]
    assert {family.name for family in HARD} == {problem.family for problem in posed if is_hard(problem)}
    assert 120 < sum(map(is_hard, posed)) < 280 and 40 < len(asked) - len(posed) < 120
    assert all(check(example.problem, example.answer) for example in asked)
    unseen = list(hard_examples(0, 300, PIECES))
    assert all(is_hard(example.problem) and is_test(example.problem) for example in unseen)
    assert all(check(example.problem, example.answer) for example in unseen)


def test_preferences_refuse_outside_and_answer_inside():
    pairs = [preference_example(0, index, PIECES) for index in range(300)]
    assert pairs == [preference_example(0, index, PIECES) for index in range(300)]
    declined = [is_refusal(pair.chosen.rpartition("</think>")[2].strip()) for pair in pairs]
    rejected = [is_refusal(pair.rejected.rpartition("</think>")[2].strip()) for pair in pairs]
    assert all(a != b for a, b in zip(declined, rejected, strict=True))
    assert 100 < sum(declined) < 200
    assert all(pair.chosen.endswith("<|im_end|>") and pair.rejected.endswith("<|im_end|>") for pair in pairs)
