"""generate.py: the loop, the chat that keeps its cache, and the command as a person runs it."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import torch

from chat import EARLY_STOP_TEXT, Chat
from generate import expand_switches
from inference.decode import ThinkingBudget, generate, repetition_period, steps
from inference.engine import generate_batch
from inference.params import SamplingParams
from inference.sampling import Said, sample
from inference.session import Listener, Session, weight_bytes_per_token
from model import Config, KVCache, Qwen3

ROOT = Path(__file__).resolve().parent.parent
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> Qwen3:
    """Random weights, sharpened so that greedy choices are far from ties."""
    model = Qwen3.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def chat(tiny_checkpoint) -> Chat:
    return Chat.from_pretrained(tiny_checkpoint)


# ---- the loop ----


@torch.inference_mode()
def without_cache(model: Qwen3, ids: list[int], params: SamplingParams) -> list[int]:
    """The slow twin of `generate`: the whole text through the model for each token."""
    uniforms, reply = params.uniforms(), []
    while len(reply) < params.max_new_tokens and (not reply or reply[-1] not in (2, 0)):
        logits = model(torch.tensor([[*ids, *reply]]))[0, -1]
        reply.append(sample(logits, params, uniforms, Said(ids, reply)))
    return reply


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=7, max_new_tokens=40),
        SamplingParams(
            temperature=1.5, min_p=0.02, repetition_penalty=1.2, presence_penalty=1, seed=1, max_new_tokens=40
        ),
    ],
)
def test_the_same_text_with_and_without_cache_alone_and_in_a_batch(model, params):
    prompts = [[5, 6, 7], [9], list(range(20, 70)), [100, 200]]
    alone = [list(generate(model, ids, params)) for ids in prompts]
    assert alone == [without_cache(model, ids, params) for ids in prompts]
    assert alone == generate_batch(model, prompts, params)
    assert len({tuple(reply) for reply in alone}) == len(prompts)


def test_a_batch_takes_parameters_per_row_and_rows_end_on_their_own(model):
    prompts = [[5, 6, 7]] * 5
    params = [SamplingParams(seed=seed, max_new_tokens=4 + 9 * seed) for seed in range(5)]
    replies = generate_batch(model, prompts, params)
    assert replies == [list(generate(model, [5, 6, 7], p)) for p in params]
    assert generate_batch(model, []) == []


def test_a_reply_ends_at_an_end_token_the_length_or_the_context(model):
    endless = list(generate(model, [5, 6], SamplingParams(seed=0, temperature=2.0)))
    assert endless[-1] in (2, 0) or len(endless) == 256 - 2 + 1
    model.generation_config = model.generation_config | {"eos_token_id": endless[3]}
    try:
        ended = list(generate(model, [5, 6], SamplingParams(seed=0, temperature=2.0)))
    finally:
        model.generation_config = model.generation_config | {"eos_token_id": [2, 0]}
    assert ended == endless[: endless.index(endless[3]) + 1]
    assert len(list(generate(model, list(range(3, 256)), GREEDY))) <= 4
    with pytest.raises(ValueError, match="257 tokens, but this model's context is 256"):
        list(generate(model, [3] * 257, GREEDY))
    for bad in ([], [512], [-1]):
        with pytest.raises(ValueError):
            list(generate(model, bad, GREEDY))


def test_a_cache_that_holds_the_beginning_is_gone_on_with(model):
    ids = list(range(10, 40))
    cache = KVCache(model.config, 1, 100)
    with torch.inference_mode():
        model(torch.tensor([ids[:25]]), cache)
    assert list(generate(model, ids, GREEDY, cache=cache)) == list(generate(model, ids, GREEDY))


def test_stop_strings_end_the_ids_and_need_a_tokenizer(model, chat):
    ids = chat.encode("hello")
    free = list(generate(model, ids, GREEDY))
    at = next(i for i in range(3, 40) if chat.decode(free[i : i + 1]).isalnum() and free[i] not in free[:i])
    stop = chat.decode(free[at : at + 1])
    ended = list(generate(model, ids, SamplingParams(temperature=0, max_new_tokens=40, stop=(stop,)), chat=chat))
    assert ended == free[: at + 1]
    with pytest.raises(ValueError, match="chat"):
        list(generate(model, ids, SamplingParams(stop=("x",))))


def test_the_thinking_budget_puts_the_official_text_into_the_reply_and_goes_on(model, chat):
    prompt = [*chat.encode("hi"), chat.think_start_id]
    budget = ThinkingBudget(chat, prompt, 7)
    pairs = list(steps(model, prompt, SamplingParams(seed=2, max_new_tokens=150, top_k=300), intervene=budget))
    tokens, forced = [token for token, _ in pairs], chat.encode(EARLY_STOP_TEXT)
    assert chat.think_end_id not in tokens[:7] and tokens[7 : 7 + len(forced)] == forced
    assert [logits is None for _, logits in pairs[: 8 + len(forced)]] == [False] * 7 + [True] * len(forced) + [False]
    cacheless = sample_after(model, [*prompt, *tokens[: 7 + len(forced)]])
    assert torch.allclose(cacheless, pairs[7 + len(forced)][1], atol=1e-4)
    closed = ThinkingBudget(chat, [*prompt, chat.think_end_id], 1)
    assert closed([9]) == []


@torch.inference_mode()
def sample_after(model: Qwen3, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0, -1]


def test_endless_repetition_is_told_from_what_may_have_been_asked_for():
    noise = [i * 7919 % 997 for i in range(300)]
    assert repetition_period([*noise, *[5] * 2048]) == 1
    assert repetition_period([*noise, *[1, 2, 3] * 683]) == 3
    assert repetition_period([*noise, *noise[:100] * 21]) == 100
    assert repetition_period(noise[:256] * 8) == 256
    for honest in ([5] * 2000, noise[:11] * 100, noise[:9] * 200, noise[:100] * 20, noise[:256] * 7):  # table rows, ...
        assert repetition_period([*noise, *honest]) == 0
    assert repetition_period([*noise[:16] * 130, *noise[:15]]) == 16
    assert repetition_period([*[5] * 2032, 6, *[5] * 15]) == 0
    assert repetition_period(noise * 9) == 0, "longer than any period that is looked for"
    assert repetition_period([]) == 0


def test_a_loop_ends_the_reply_of_a_chat_unless_that_is_turned_off(model, chat):
    for loop_stop in (True, False):
        listener = Listener(chat, [5], loop_stop=loop_stop)
        ended = []
        for _ in range(2100):
            listener.push(7)
            ended.append(listener.ended)
        assert ended.index(True) == 2047 if loop_stop else not any(ended), loop_stop


# ---- a chat ----


def test_the_second_turn_computes_only_what_is_new_and_says_the_same(model, chat):
    params = SamplingParams(temperature=0, max_new_tokens=20)
    session, fresh = Session(model, chat, params), Session(model, chat, params)
    first = session.ask("What is 2 + 2?")
    assert first.stats["cached_tokens"] == 0 and first.stats["prefill_tokens"] == first.prompt_tokens
    second = session.ask("And 5 more?")
    assert second.stats["cached_tokens"] >= first.prompt_tokens
    assert second.stats["cached_tokens"] + second.stats["prefill_tokens"] == second.prompt_tokens
    fresh.messages = session.messages[:2]
    again = fresh.ask("And 5 more?")
    assert again.stats["cached_tokens"] == 0
    assert (again.token_ids, again.answer) == (second.token_ids, second.answer)
    session.reset()
    assert session.ask("What is 2 + 2?").token_ids == first.token_ids


def test_a_growing_chat_moves_into_a_larger_cache(model, chat):
    session = Session(model, chat, SamplingParams(temperature=0, max_new_tokens=5))
    lengths = []
    for _ in range(4):
        answer = session.ask("again and again")
        lengths.append(session.cache.max_len)
        assert answer.token_ids == list(generate(model, chat.render(session.messages[:-1]), session.params))
    assert lengths[-1] > lengths[0]


def test_what_was_said_until_ctrl_c_stays_in_the_chat(model, chat):
    session, shown = Session(model, chat, SamplingParams(seed=1, max_new_tokens=100)), []

    def show(kind: str, text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = session.ask("hello", show)
    assert answer.finish_reason == "interrupted" and answer.answer and len(answer.token_ids) < 100
    assert session.messages[-1]["content"] == answer.answer
    assert session.ask("go on").stats["cached_tokens"] > 0


def test_a_context_that_is_full_ends_clearly(model, chat, monkeypatch):
    """The last token may lie behind the context, since nothing is computed from it."""
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": 511})
    with torch.no_grad():
        row = model.model.embed_tokens.weight[511].clone()
        model.model.embed_tokens.weight[511] = 0  # its logit is 0 and never the largest
    try:
        session = Session(model, chat, SamplingParams(temperature=0), loop_stop=False)
        answer = session.ask("hello")
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight[511] = row
    assert answer.finish_reason == "context"
    assert answer.prompt_tokens + len(answer.token_ids) == model.config.max_position_embeddings + 1
    with pytest.raises(ValueError, match="context is 256"):
        session.ask("word " * 300)
    assert len(session.messages) == 2, "a question that could not be asked is not part of the chat"


def test_an_interrupt_before_the_first_token_leaves_the_chat_as_it_was(model, chat, monkeypatch):
    session = Session(model, chat, SamplingParams(temperature=0, max_new_tokens=5))
    first = session.ask("hello")
    before = list(session.messages)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    for ask in (lambda: session.ask("more"), session.retry):
        with monkeypatch.context() as patch:
            patch.setattr("inference.decode.sample", interrupted)
            answer = ask()
        assert answer.finish_reason == "interrupted" and session.messages == before
    session.reset()
    assert session.ask("hello").token_ids == first.token_ids, "the cache is what its ids say"


def test_an_interrupt_anywhere_leaves_cache_and_ids_together(model, chat, monkeypatch):
    params = SamplingParams(temperature=0, max_new_tokens=5)
    session = Session(model, chat, params)
    session.ask("one two three four five")
    with monkeypatch.context() as patch:

        def interrupted(*arguments):
            raise KeyboardInterrupt

        patch.setattr(Listener, "finish", interrupted)  # a second Ctrl-C, outside of the loop
        with pytest.raises(KeyboardInterrupt):
            session.ask("something else entirely")
    assert session.ask("one two").token_ids == list(generate(model, chat.render(session.messages[:-1]), params))


def test_a_retry_is_the_last_question_by_the_next_seed(model, chat):
    session = Session(model, chat, SamplingParams(temperature=1, seed=8, max_new_tokens=12))
    with pytest.raises(ValueError, match="no reply yet"):
        session.retry()
    session.ask("hello")
    second, prompt = session.retry(), chat.render(session.messages[:1])
    assert second.token_ids == list(generate(model, prompt, SamplingParams(seed=9, max_new_tokens=12)))
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    session.set_system("Be brief.")
    session.retry()
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    session.set_system(None)
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_logprobs_are_those_of_the_bare_logits(model, chat):
    session = Session(model, chat, SamplingParams(temperature=0.5, seed=3, max_new_tokens=6, top_k=5), logprobs=4)
    answer = session.ask("hello")
    ids = [*chat.render(session.messages[:1]), *answer.token_ids]
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0, answer.prompt_tokens - 1 :].log_softmax(-1)
    for token, entry, row in zip(answer.token_ids, answer.logprobs, expected[:-1], strict=True):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        top = row.topk(4)
        assert [one["token_id"] for one in entry["top"]] == top.indices.tolist()
        assert [one["logprob"] for one in entry["top"]] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_weight_bytes_per_token_count_what_a_token_reads():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "model_type": "qwen3_moe"}
    config = Config(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2)
    attention, norms = 16 * 16 + 2 * 16 * 8 + 16 * 16, 3 * 16 + 2 * 4
    read = (
        attention + norms + 6 * 16 + 2 * 3 * 16 * 8 + 50 * 16 + 16
    )  # router; two experts; the head; one embedding row
    rope = 2  # frequencies
    assert weight_bytes_per_token(Qwen3(config)) == 4 * (read + rope)


# ---- the command ----


def run(*arguments: str, stdin: str = "", **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "generate.py", *arguments]
    options |= {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    return subprocess.run(command, input=stdin, check=False, **options)


def test_the_json_record_has_the_promised_fields(tiny_checkpoint):
    arguments = ("--model", str(tiny_checkpoint), "--json", "--seed", "4", "--max-new-tokens", "12")
    result = run("hello", *arguments, "--logprobs", "3", "--stats")
    record = json.loads(result.stdout)
    assert set(record) >= {"prompt_tokens", "thinking", "answer", "tokens", "finish_reason", "stats"}
    assert record["tokens"] == len(record["token_ids"]) == len(record["logprobs"]) <= 12
    for entry in record["logprobs"]:
        assert len(entry["top"]) == 3 and entry["logprob"] <= entry["top"][0]["logprob"] <= 0
    assert record["stats"]["share_of_read_bandwidth"] > 0 and "tok/s" in result.stderr
    assert json.loads(run("hello", *arguments).stdout)["token_ids"] == record["token_ids"]
    assert json.loads(run(*arguments, stdin="hello\n").stdout)["token_ids"] == record["token_ids"]
    by_line = run(*arguments, "--multi-turn", stdin="hello\nmore\n").stdout.splitlines()
    first, second = map(json.loads, by_line)
    assert first["token_ids"] == record["token_ids"] and second["stats"]["cached_tokens"] > 0


def test_raw_continues_plain_text(tiny_checkpoint, model, chat):
    result = run("once upon", "--raw", "--model", str(tiny_checkpoint), "--temperature", "0", "--max-new-tokens", "9")
    plain = Qwen3.from_pretrained(tiny_checkpoint)
    ids = list(generate(plain, chat.encode("once upon"), SamplingParams(temperature=0, max_new_tokens=9)))
    assert result.stdout == chat.decode(ids, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_a_gguf_answers_like_the_safetensors_that_it_came_from(type, tmp_path):
    gguf = tmp_path / "tiny.gguf"
    command = [sys.executable, "convert.py", "--to", "gguf", "--type", type, "--model", "models/tiny", "--out", gguf]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    questions = [f"What is {a} + {3 * a}?" for a in (2, 14, 120, 307)]
    texts = {}
    for source in ("models/tiny", str(gguf)):
        model, chat = Qwen3.from_pretrained(ROOT / source), Chat.from_pretrained(ROOT / source)
        prompts = [chat.render([{"role": "user", "content": question}]) for question in questions]
        texts[source] = [chat.decode(reply) for reply in generate_batch(model, prompts, GREEDY)]
    assert len(set(texts["models/tiny"])) == len(questions)
    assert texts[str(gguf)] == texts["models/tiny"]


def test_switches_may_stand_alone_before_the_prompt():
    assert expand_switches(["--thinking", "Hi?"]) == ["--thinking", "on", "Hi?"]
    assert expand_switches(["--thinking", "off", "Hi?"]) == ["--thinking", "off", "Hi?"]
    assert expand_switches(["--multi-turn", "--thinking"]) == ["--multi-turn", "on", "--thinking", "on"]


class Terminal:
    """A command in a terminal of its own: what a person types and sees."""

    def __init__(self, *arguments: str):
        self.descriptor, theirs = pty.openpty()
        command = [*launch.COMMAND, "--terminal", sys.executable, "generate.py", *arguments]
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while wanted not in self.text:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            try:
                piece = os.read(self.descriptor, 4096) if ready else b""
            except OSError:
                piece = b""
            assert piece, f"{wanted!r} did not come; the terminal shows {self.text!r}"
            self.text += piece.decode(errors="replace")
        seen, _, self.text = self.text.partition(wanted)
        return seen + wanted

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.descriptor)
        return code


def test_a_chat_in_a_terminal_survives_ctrl_c(tiny_checkpoint, tmp_path):
    """The template opens the thinking, so that a random model's first words are shown dim."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "thinking")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    slow = ("--max-new-tokens", "200", "--seed", "1", "--temperature", "3")
    terminal = Terminal("--model", str(checkpoint), "--stats", *slow)
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until("\x1b[2m")
    terminal.type("\x03")
    terminal.read_until("tok/s")
    terminal.read_until("> ")
    terminal.type("more\n")
    terminal.read_until("more from the cache")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_closed_pipe_and_an_interrupt_end_quietly(tiny_checkpoint):
    command = [sys.executable, "generate.py", "hi", "--model", str(tiny_checkpoint), "--seed", "1"]
    pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    pipe.stdout.close()
    assert b"Traceback" not in pipe.stderr.read() and pipe.wait() in (0, 130)
    waiting = subprocess.Popen(
        [
            *launch.COMMAND,
            *command[:2],
            "--model",
            str(tiny_checkpoint),
            "--multi-turn",
            "--json",
            "--max-new-tokens",
            "3",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    waiting.stdin.write(b"hi\n")
    waiting.stdin.flush()
    assert waiting.stdout.readline()  # it has loaded, and waits for the next line
    waiting.send_signal(signal.SIGINT)
    _, error = waiting.communicate()
    assert waiting.returncode == 130 and b"Traceback" not in error
