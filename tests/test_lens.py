"""lens.py: its numbers are transformers' by brute force, a page is verified to the digit, and a browser can use it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lens
from chat import Chat
from data.corpus.tokenizer import TINY
from inspection.lens.architecture import architecture, read_architecture
from inspection.lens.attribution import rank_correlation
from inspection.lens.numbers import unpack_attention
from inspection.lens.spans import parts, prompt_spans, reply_spans
from inspection.page import _json
from model import Config, Qwen3

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Please help me. What is 47 * 8? Think about it."

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs lens.py in this process; returns its exit status and what it prints."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["lens.py", *map(str, arguments)])
        status = 0
        try:
            lens.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, dict]:
    """A page of the bundled model, and its numbers."""
    folder = tmp_path_factory.mktemp("lens")
    arguments = [
        QUESTION,
        "--model",
        str(TINY),
        "--out",
        str(folder / "lens.html"),
        "--json",
        str(folder / "lens.json"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lens.py", *arguments, "--temperature", "0.6", "--top-k", "3"])
        lens.main()
    return folder / "lens.html", json.loads((folder / "lens.json").read_text())


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logprobs(reference, ids: list[int]) -> torch.Tensor:
    """[N - 1, V] in bits, by transformers."""
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) / math.log(2)


# --- numbers ---


def test_tokens_have_transformers_bits(page, reference):
    found = page[1]
    ids = [token["id"] for token in found["tokens"]]
    table = logprobs(reference, ids)
    entropy = -(table * (2**table)).sum(-1)
    for at in range(1, len(ids)):
        token, row = found["tokens"][at], table[at - 1]
        assert token["bits"] == pytest.approx(-float(row[ids[at]]), abs=1e-4)
        assert token["entropy_bits"] == pytest.approx(float(entropy[at - 1]), abs=1e-4)
        assert token["rank"] == 1 + int((row > row[ids[at]]).sum())
    first, roles = found["tokens"][0], [token["role"] for token in found["tokens"]]
    assert first["bits"] is None and first["rank"] is None
    assert roles == sorted(roles, key=["prompt", "thinking", "answer"].index) and set(roles) >= {"thinking", "answer"}
    assert "".join(token["text"] for token in found["tokens"]) == Chat.from_pretrained(TINY).decode(ids)


def test_leave_one_out_is_a_brute_force_loop(page, reference):
    found = page[1]
    ids, begin = [token["id"] for token in found["tokens"]], found["reply"]
    whole = logprobs(reference, ids)
    assert len(found["spans"]) > 4 and len(found["attribution"]) == len(ids) - begin
    for row in found["attribution"]:
        place = row["token"]
        assert [e["span"] for e in row["spans"]] == [i for i, s in enumerate(found["spans"]) if s["end"] <= place]
        assert row["total_bits"] == pytest.approx(sum(e["bits"] for e in row["spans"]), abs=1e-3)
    for index, span in enumerate(found["spans"]):
        cut = ids[: span["start"]] + ids[span["end"] :]
        without, size = logprobs(reference, cut), span["end"] - span["start"]
        for row in found["attribution"]:
            place = row["token"]
            if place < span["end"]:
                continue
            expected = float(whole[place - 1, ids[place]] - without[place - size - 1, ids[place]])
            (entry,) = [e for e in row["spans"] if e["span"] == index]
            assert entry["bits"] == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_gradients_are_transformers(page, reference):
    found = page[1]
    ids = torch.tensor([[token["id"] for token in found["tokens"]]])
    for row in found["attribution"][3::11]:
        x = reference.get_input_embeddings()(ids).detach().requires_grad_()
        logits = reference(inputs_embeds=x).logits[0, row["token"] - 1]
        (logits.log_softmax(-1)[ids[0, row["token"]]] / math.log(2)).backward()
        for entry in row["spans"]:
            span = found["spans"][entry["span"]]
            gradient = x.grad[0, span["start"] : span["end"]]
            product = (gradient * x[0, span["start"] : span["end"]]).sum()
            assert entry["gradient_norm"] == pytest.approx(float(gradient.norm(dim=-1).sum()), rel=1e-3, abs=1e-6)
            assert entry["gradient_x_input"] == pytest.approx(product.item(), rel=1e-3, abs=1e-5)


def test_the_last_layer_is_the_logits_and_attention_is_eager(page, reference):
    found = page[1]
    ids, begin = [token["id"] for token in found["tokens"]], found["reply"]
    with torch.no_grad():
        out = reference(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    likeliest = out.logits[0, begin - 1 : -1].softmax(-1).max(-1)
    last = found["layers"][-1]["tokens"]
    assert [one["id"] for one in last] == likeliest.indices.tolist()
    assert [one["p"] for one in last] == pytest.approx(likeliest.values.tolist(), abs=1e-5)
    middle = reference.lm_head(reference.model.norm(out.hidden_states[2][0, begin - 1 : -1])).softmax(-1).max(-1)
    assert [one["id"] for one in found["layers"][2]["tokens"]] == middle.indices.tolist()
    for layer in range(len(found["layers"]) - 1):  # the last hidden state that transformers gives is normed already
        norms = out.hidden_states[layer][0].norm(dim=-1)
        assert found["residual_norms"][layer] == pytest.approx(norms.tolist(), rel=1e-4)
    places, weights = unpack_attention(found["attention"])
    eager = torch.stack(out.attentions)[:, 0, :, begin - 1 : -1]
    assert places.shape[:3] == eager.shape[:3]
    taken = eager.gather(-1, torch.from_numpy(places.astype("i8")))
    assert torch.allclose(taken, torch.from_numpy(weights.astype("f4")), atol=1e-3)
    assert (weights.sum(-1) <= 1.002).all() and torch.allclose(eager.sum(-1), torch.ones(()), atol=1e-5)
    kept = torch.from_numpy(weights.astype("f4"))
    assert torch.allclose(kept, eager.topk(kept.shape[-1]).values, atol=1e-3)


def test_alternatives_before_and_after_the_filters(page):
    found = page[1]
    for at, rows in enumerate(found["alternatives"]):
        assert found["tokens"][found["reply"] + at]["id"] in [row["id"] for row in rows]
        assert sum(row["sampled"] > 0 for row in rows) == 3 or min(r["p"] for r in rows) == 0
        assert sum(row["sampled"] for row in rows) == pytest.approx(1, abs=1e-4)
        mine = next(row for row in rows if row["id"] == found["tokens"][found["reply"] + at]["id"])
        assert -math.log2(mine["p"]) == pytest.approx(found["tokens"][found["reply"] + at]["bits"], abs=1e-3)


def test_spans_cover_the_messages_and_nothing_else():
    chat = Chat.from_pretrained(TINY)
    system, prompt = "Be kind.\n- One thing\n- Another", "Straße? Äpfel! 中文。你好 😀 end"
    ids = chat.render([{"role": "system", "content": system}, {"role": "user", "content": prompt}])
    found = prompt_spans(chat, ids, [system, prompt], single=False)
    texts = [span.text.strip() for span in found]
    assert texts[:3] == ["Be kind.", "- One thing", "- Another"] and texts[3:6] == ["Straße?", "Äpfel!", "中文。"]
    tokens = [t for span in found for t in range(span.start, span.end)]
    assert tokens == sorted(set(tokens)) and not {ids[t] for t in tokens} & chat.special_ids
    single = prompt_spans(chat, ids, [system, prompt], single=True)
    assert all(span.end == span.start + 1 for span in single) and {s.start for s in single} == set(tokens)
    said = [*ids, chat.think_start_id, *chat.encode("a. b"), chat.think_end_id, *chat.encode("c!"), chat.eos_token_id]
    assert [s.text.strip() for s in reply_spans(chat, said, len(ids), False)] == ["a.", "b", "c!"]
    assert list(parts(" \n ")) == [] and list(parts("3.14 is pi")) == [(0, 10)]


@pytest.mark.parametrize(
    "prompt",
    ["e\u0301 caf\u00e9 👩‍👩‍👧. End", "<|im_end|> one. <think>two</think>. <|im_start|>", "مرحبا \u202eevil. שלום"],
)
def test_a_prompt_has_spans_however_it_is_normalised(prompt):
    chat = Chat.from_pretrained(TINY)
    ids = chat.render([{"role": "user", "content": prompt}])
    found = prompt_spans(chat, ids, [prompt], single=False)
    tags = {chat.think_start_id, chat.think_end_id} | chat.special_ids
    assert len(found) >= 2 and all(span.text.strip() for span in found)
    assert not {ids[t] for span in found for t in range(span.start, span.end)} & tags


def test_a_text_of_one_part_has_nothing_before_its_first_token(command, tmp_path):
    """Without a template the only part is all that there is: the first token of the reply has no other context."""
    command("Once upon", "--raw", "--model", TINY, "--answer", " a time, it", "--json", tmp_path / "l.json")
    found = json.loads((tmp_path / "l.json").read_text())
    assert found["spans"][0]["start"] == 0
    first, *others = [[entry["span"] for entry in row["spans"]] for row in found["attribution"]]
    assert 0 not in first and others and all(0 in row for row in others)


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    a, b = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 0.5, 7.0, 0.5, 8.0]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None


# --- verification ---


def test_a_page_verifies_and_one_changed_digit_is_named(page, command, tmp_path):
    html = page[0].read_text()
    assert command("--verify", page[0]) == (0, "every number of the page is what the model gives, to the digit\n")
    value = max(entry["bits"] for row in page[1]["attribution"] for entry in row["spans"])
    old = json.dumps(value)
    changed = old[:-1] + ("1" if old[-1] != "1" else "2")
    (tmp_path / "changed.html").write_text(html.replace(f'"bits": {old}', f'"bits": {changed}', 1))
    status, said = command("--verify", tmp_path / "changed.html")
    assert status == 1 and f"the page says {changed}, the model gives {old}" in said
    (tmp_path / "moved.html").write_text(html.replace('"rank": 1,', '"rank": 2,', 1))
    status, said = command("--verify", tmp_path / "moved.html")
    assert status == 1 and re.search(r"tokens\[\d+\]\.rank: the page says 2, the model gives 1", said)


def test_every_kind_of_change_is_named(page, command, tmp_path):
    """A digit of the data, of the drawn page, of the settings: each is held against what is computed again."""
    html = page[0].read_text()
    data = re.search(r'(?s)id="lens">(.*?)</script>', html)[1]

    def said_of(changed: str) -> str:
        (tmp_path / "changed.html").write_text(changed)
        status, said = command("--verify", tmp_path / "changed.html")
        assert status == 1, said
        return said

    found = json.loads(data)
    for change, place in (
        (lambda d: d["layers"][1]["tokens"][0].update(p=0.123), r"^layers\[1\]\.tokens\[0\]\.p: the page says 0\.123"),
        (lambda d: d["architecture"].update(parameters=479_265), r"architecture\.parameters: the page says 479265"),
        (lambda d: d["alternatives"][2][0].update(sampled=0.5), r"alternatives\[2\]\[0\]\.sampled"),
        (lambda d: d["attention"].update(data="AAAA"), "attention: the page says"),
        (lambda d: d["settings"].update(answer="42"), r"tokens \(reply\)"),
        (lambda d: d["settings"].update(prompt="What else?"), r"tokens \(prompt\)"),
        (lambda d: d["names"].update({next(iter(d["names"])): "x"}), "names"),
    ):
        other = json.loads(data)
        change(other)
        assert re.search(place, said_of(html.replace(data, str(_json(other))))), place
    drawn = said_of(html.replace("479,264", "471,000"))
    assert re.search(r"page \(line \d+, column \d+\): the page says .*1,000", drawn)
    unlike = html.replace(found["layout"], "0" * 64).replace("479,264", "471,000")
    (tmp_path / "older.html").write_text(unlike)
    assert command("--verify", tmp_path / "older.html")[0] == 0


@pytest.mark.parametrize("content", ["", "<html>", '{"schema": "nanoqwen/lens/1"}', "[" * 9999, '{"schema": 3}'])
def test_what_is_no_page_is_one_line(command, tmp_path, content):
    (tmp_path / "x.html").write_text(content)
    with pytest.raises(ValueError, match=r"x\.html") as error:
        command("--verify", tmp_path / "x.html")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["gguf", "int8"])
def test_other_containers(command, tmp_path, form):
    out = tmp_path / ("m.gguf" if form == "gguf" else "m")
    convert = [sys.executable, "convert.py", "--to", form, "--model", str(TINY), "--out", str(out)]
    subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
    command("What is 12 + 30?", "--model", out, "--out", tmp_path / "l.html", "--answer", "12 + 30 = 42.")
    assert command("--verify", tmp_path / "l.html")[0] == 0


def test_experts_and_a_text_without_a_template(command, tmp_path):
    sizes = {"vocab_size": 800, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    Qwen3(Config(**sizes, **experts)).save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "moe")
    flags = ("--model", tmp_path / "moe", "--raw", "--spans", "tokens", "--max-new-tokens", 4)
    command("Once upon a time. There was", *flags, "--json", tmp_path / "l.json")
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["spans"]) >= found["reply"] - 1 and found["architecture"]["operations"]["TopK"] == 2
    assert command("--verify", tmp_path / "l.json")[0] == 0


def test_its_form_is_its_schemas(page):
    from jsonschema import Draft202012Validator

    Draft202012Validator(json.loads((ROOT / "schemas" / "lens.schema.json").read_text())).validate(page[1])


# --- the model itself ---

SHAPES = {
    "dense": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"mlp_only_layers": [1]},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_architecture_counts_what_the_model_has(name):
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = Config(**{**sizes, **SHAPES[name]})
    with torch.device("meta"):
        model = Qwen3(config)
    found = architecture(config)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    modules = [type(m).__name__ for m in model.modules()]
    tied = int(config.tie_word_embeddings)  # a tied head is a product, but no module of its own
    assert found["operations"]["Linear"] == modules.count("Linear") + tied
    assert found["operations"]["RMSNorm"] == modules.count("RMSNorm")
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])
    assert found["cache_bytes_per_position"] == 2 * 2 * 3 * 2 * 8


def test_the_published_sizes(assets):
    """shared facts of the model cards: (parameters, those of one token without the embedding's other rows)."""
    for name, parameters in (("0.6B", 596_049_920), ("30B-A3B", 30_532_122_624), ("235B-A22B", 235_093_634_560)):
        found = read_architecture(str(assets / "configs" / f"Qwen3-{name}.config.json"))
        assert found["parameters"] == parameters
    assert found["blocks"] == 94 and found["active_parameters"] == 22_190_763_520 - 151_936 * 4096 + 4096


@pytest.fixture(scope="module")
def assets() -> Path:
    import os

    path = os.environ.get("NANOQWEN_ASSETS")
    if not path:
        pytest.skip("NANOQWEN_ASSETS does not name the folder of official files")
    return Path(path)


def test_the_architecture_page_needs_no_weights(command, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(TINY / "config.json", tmp_path / "bare")
    status, said = command("--architecture", "--model", tmp_path / "bare", "--out", tmp_path / "a.html")
    assert status == 0 and said.startswith("479,264 parameters in 4 blocks")
    assert "Content-Security-Policy" in (tmp_path / "a.html").read_text()
    status, said = command("--architecture", "--model", TINY, "--json", tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())["stored"]
    assert stored["types"] == {"bfloat16": 958528} and stored["tensors"] == 46
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        command("--architecture", "--model", tmp_path / "empty")


@pytest.fixture
def described_by_hub(command, tmp_path, monkeypatch):
    """What --architecture says of a hub model with these weights, and how many bytes were sent for it."""
    from local_hub import Hub, use

    def described(weights: bytes) -> tuple[dict, int]:
        hub = Hub({"config.json": (TINY / "config.json").read_bytes(), "model.safetensors": weights})
        use(hub.url, tmp_path, monkeypatch)
        try:
            command("--architecture", "--model", "org/name", "--json", tmp_path / "a.json")
        finally:
            hub.shutdown()
            hub.server_close()
        return json.loads((tmp_path / "a.json").read_text()), hub.sent

    return described


def test_a_hub_model_is_described_by_its_headers(described_by_hub):
    from safetensors.torch import load_file, save

    found, sent = described_by_hub(save(load_file(TINY / "model.safetensors") | {"padding": torch.zeros(4 << 20)}))
    assert found["parameters"] == 479_264 and found["stored"]["types"] == {"bfloat16": 958528, "float32": 16 << 20}
    assert sent < 200_000  # of 17 MB


def test_headers_beyond_what_may_be_read_leave_the_config(described_by_hub):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor {n}": entry for n in range(20_000)}).encode()
    found, sent = described_by_hub(len(header).to_bytes(8, "little") + header)
    assert found["parameters"] == 479_264 and found["stored"] is None and sent < 1_000_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a prompt"),
        (["hi", "--architecture"], "give a prompt"),
        (["hi", "--raw", "--system", "a"], "leave --system out"),
        (["hi", "--model", str(TINY), "--answer", ""], "no reply to look at"),
        (["hi", "--temperature", "-1"], "--temperature is -1"),
    ],
)
def test_bad_arguments(command, arguments, said):
    with pytest.raises(ValueError, match=said):
        command(*arguments)


# --- in a browser ---


def test_a_browser_opens_every_tab(page, browser):
    view = browser.new_page(viewport={"width": 390, "height": 800})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(page[0].as_uri())
    tabs = view.locator("[role=tab]")
    assert tabs.count() == 5
    for index in range(5):
        tabs.nth(index).click()
        assert view.locator("[role=tabpanel]").nth(index).is_visible()
    tabs.nth(1).click()
    tokens = view.locator("#reply .tok")
    tokens.nth(9).click()
    token = page[1]["tokens"][page[1]["reply"] + 9]
    assert f"(id {token['id']})" in view.locator("#token-facts").inner_text()
    assert "bits, entropy" in tokens.nth(9).get_attribute("title")
    view.keyboard.press(".")
    following = page[1]["tokens"][page[1]["reply"] + 10]
    assert f"(id {following['id']})" in view.locator("#token-facts").inner_text()
    tabs.nth(2).click()
    view.select_option("#measure", "gradient_x_input")
    assert "gradient × input" in view.locator("#origin-facts").inner_text()  # noqa: RUF001
    tabs.nth(3).click()
    view.wait_for_selector("#heads rect")
    view.select_option("#head", "2")
    assert "head 2" in view.locator("#attention-facts").inner_text()
    wide = view.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390 and not said and all(url.startswith("file:") for url in asked)
    view.close()


def test_text_is_never_markup(command, tmp_path, browser):
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u202e"
    command(f"{evil} What?", "--model", TINY, "--out", tmp_path / "l.html", "--answer", f"{evil} & so on.")
    view, said = browser.new_page(), []
    view.on("dialog", lambda dialog: said.append(dialog.message))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto((tmp_path / "l.html").as_uri())
    view.locator("[role=tab]").nth(2).click()
    assert not said and view.locator("img").count() == 0 and "\u202e" not in view.locator("main").inner_text()
    view.close()
