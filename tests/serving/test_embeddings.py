"""/v1/embeddings of a checkpoint in Qwen3-Embedding's layout, held against transformers."""

import json
import shutil
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from chat import Chat
from model import Qwen3
from serving import jobs
from serving.embedding import has_pooling

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 96, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
TEXTS = ["What is the capital of China?", "é 日本 <|im_end|> x", "long " * 300, "a"]
INSTRUCT = "Instruct: Given a question, find its answer\nQuery: What is gravity?"


def write(folder: Path, modules=MODULES, pooling=POOLING) -> Path:
    """The bundled model under the published names (no `model.` before them), float32; the tokenizer ends each text."""
    shutil.copytree("models/tiny", folder, dirs_exist_ok=True)
    tensors = {
        name.removeprefix("model."): value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    end = {"id": "<|endoftext|>", "type_id": 0}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": end}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end["id"]: {"id": end["id"], "ids": [732], "tokens": [end["id"]]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def client(serving, folder):
    model = Qwen3.from_pretrained(folder), Chat.from_pretrained(folder)
    with (
        serving(model=model, name="embedding", pooling=has_pooling(folder)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected(folder):
    """The recipe by transformers: the last token's hidden state, L2-normalised."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed(text: str, dimensions: int | None = None) -> torch.Tensor:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(states[:dimensions], dim=-1)

    return embed


def test_vectors_are_those_of_the_recipe(client, expected):
    reply = client.embeddings.create(model="embedding", input=[*TEXTS, INSTRUCT])  # the client asks for base64
    for place, (text, found) in enumerate(zip([*TEXTS, INSTRUCT], reply.data, strict=True)):
        assert found.index == place and len(found.embedding) == 96
        torch.testing.assert_close(torch.tensor(found.embedding), expected(text), atol=2e-5, rtol=0)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 300


def test_forms_of_input_and_output(client, expected, folder):
    one = client.embeddings.create(model="embedding", input=TEXTS[0], encoding_format="float").data[0].embedding
    torch.testing.assert_close(torch.tensor(one), expected(TEXTS[0]), atol=2e-5, rtol=0)
    ids = Chat.from_pretrained(folder).encode(TEXTS[0], add_special_tokens=True)
    assert ids[-1] == 732
    assert client.embeddings.create(model="embedding", input=ids, encoding_format="float").data[0].embedding == one
    short = client.embeddings.create(model="embedding", input=TEXTS[0], dimensions=32).data[0].embedding
    torch.testing.assert_close(torch.tensor(short), expected(TEXTS[0], 32), atol=2e-5, rtol=0)
    for wrong, name in (
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "x", "dimensions": 97}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "word " * 3000}, "input"),
    ):
        with pytest.raises(openai.BadRequestError) as found:
            client.embeddings.create(model="embedding", **wrong)
        assert found.value.param == name


def test_other_recipes_are_none_that_is_known(tmp_path):
    assert has_pooling(write(tmp_path / "right"))
    assert not has_pooling(Path("models/tiny"))
    mean = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
    assert not has_pooling(write(tmp_path / "mean", pooling=mean))
    dense = [*MODULES, {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    assert not has_pooling(write(tmp_path / "dense", modules=dense))


def test_the_hub_is_asked_for_the_recipe_too():
    from formats.hub import _wanted

    names = ["1_Pooling/config.json", "config.json", "model.safetensors", "modules.json", "onnx/model.onnx"]
    assert _wanted(names, False, None) == names[:-1]


@pytest.mark.parametrize("count", [2, 4, 5, 6, 9])
def test_the_last_piece_of_a_prompt_is_computed_however_short_it_is(count, tiny, monkeypatch):
    monkeypatch.setattr(jobs, "PIECE", 4)
    model, ids = tiny[0], list(range(300, 300 + count))

    def result(job):
        while True:
            try:
                next(job)
            except StopIteration as end:
                return end.value

    with torch.no_grad():
        logits, states = model(torch.tensor([ids]))[0], model.model(torch.tensor([ids]))[0]
    scores = result(jobs.score(model, ids, lambda row, token: float(row[token])))
    assert scores == pytest.approx([float(logits[i, token]) for i, token in enumerate(ids[1:])], rel=1e-3, abs=1e-3)
    (vector,) = result(jobs.embed(model, [ids], None))
    torch.testing.assert_close(vector, torch.nn.functional.normalize(states[-1], dim=-1), rtol=1e-3, atol=1e-4)
