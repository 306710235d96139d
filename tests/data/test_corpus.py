"""The generated corpus, its tokenizer and its template."""

import hashlib
import json
import os
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

from data.corpus import letters, overlap, talk
from data.corpus.examples import (
    FAMILIES,
    SWITCH,
    check,
    document,
    is_test,
    question_example,
    solve,
    training_example,
    unseen_examples,
)
from data.corpus.preferences import preference_example
from data.corpus.tasks import SHOWCASE, Problem, draw, held_out
from data.corpus.tokenizer import KEYWORDS, TINY, pieces_of, tokenizer_config, train

PIECES = pieces_of(TINY)
ASSETS = os.environ.get("NANOQWEN_ASSETS")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trace_arrives_at_the_truth(name):
    family, rng = FAMILIES[name], Random(f"truth {name}")
    for _ in range(400):
        facts = family.sample(rng)
        trace, answer = family.solve(facts, PIECES)
        assert check(Problem(name, facts), answer), (facts, trace, answer)
        assert trace and len(trace.splitlines()) >= 2


WRONG = [
    (Problem("sum", (473, 89)), "473 + 89 = 563."),
    (Problem("difference", (77, 512)), "77 - 512 = 435."),
    (Problem("product", (47, 8)), "47 * 8 is a lot."),
    (Problem("larger", ("9.11", "9.9", "larger")), "9.11 is larger than 9.9."),
    (Problem("larger", ("9.90", "9.9", "larger")), "9.90 is larger than 9.9."),
    (Problem("sort", ((3, 1, 2), "largest")), "1, 2, 3."),
    (Problem("story", ("*-", 3, 5, 4, "Tom", "pens")), "It is 15 pens."),
    (Problem("count", (("strawberry",), "r")), "The letter r appears 2 times in strawberry."),
    (Problem("count", (("strawberry",), "r")), "2 or 3 times"),
    (Problem("length", ("strawberry",)), "strawberry has 9 letters."),
    (Problem("reverse", ("abc",)), "abc backwards is a-b-c."),
    (Problem("weekday", ("Monday", 8, "after")), "8 days after Monday is Monday."),
    (Problem("date", ("February", 27, 3, "after")), "3 days after February 27 is February 30."),
]
RIGHT = [
    (Problem("sum", (473, 89)), "473 + 89 = 562."),
    (Problem("difference", (77, 512)), "77 - 512 = -435."),
    (Problem("larger", ("9.11", "9.9", "larger")), "9.9 is larger than 9.11."),
    (Problem("larger", ("9.90", "9.9", "larger")), "9.90 and 9.9 are equal."),
    (Problem("count", (("strawberry",), "r")), "The letter r appears 3 times in strawberry."),
    (Problem("reverse", ("strawberry",)), "strawberry backwards is y-r-r-e-b-w-a-r-t-s."),
    (Problem("weekday", ("Monday", 8, "after")), "8 days after Monday is Tuesday."),
    (Problem("date", ("February", 27, 3, "after")), "3 days after February 27 is March 2."),
]


@pytest.mark.parametrize(("problem", "answer"), WRONG)
def test_wrong_answers_are_wrong(problem, answer):
    assert not check(problem, answer)
    assert not check(problem, "")


@pytest.mark.parametrize(("problem", "answer"), RIGHT)
def test_right_answers_are_right(problem, answer):
    assert check(problem, answer)
    assert solve(problem, PIECES)[1] == answer


def test_training_and_test_share_no_question():
    trained, shown = set(), set()
    for index in range(3000):
        example = training_example(0, index, PIECES)
        shown |= {SWITCH.sub("", m["content"]) for m in example.messages if m["role"] == "user"}
        if example.problem:
            assert not is_test(example.problem)
            trained |= set(FAMILIES[example.problem.family].keys(example.problem.facts))
    for example in unseen_examples(0, 600, PIECES):
        keys = FAMILIES[example.problem.family].keys(example.problem.facts)
        assert all(held_out(key) for key in keys) and not trained & set(keys)
        assert example.messages[-1]["content"] not in shown
    assert not trained & SHOWCASE


def test_the_bundled_weights_come_from_this_stream():
    """Whoever changes the corpus changes what `make tiny` gives: this hash has to change with the weights."""
    digest = hashlib.sha256()
    for index in range(200):
        digest.update(repr(training_example(0, index, PIECES)).encode())
        digest.update(document(0, index, PIECES).encode())
        digest.update(repr(preference_example(0, index, PIECES)).encode())
        digest.update(repr(question_example(0, index, PIECES, 0.4, 0.1)).encode())
    assert digest.hexdigest()[:16] == "48d95f850e84626a"


def test_validation_has_nothing_of_training():
    rows = [training_example(0, index, PIECES, unseen=True) for index in range(300)]
    assert all(is_test(example.problem) for example in rows)
    assert any(len(example.messages) > 2 for example in rows) and any(not example.thinking for example in rows)
    trained = {repr(training_example(0, index, PIECES).messages) for index in range(3000)}
    assert not trained & {repr(example.messages) for example in rows}
    texts = {document(0, index, PIECES) for index in range(3000)}
    assert not texts & {document(0, index, PIECES, unseen=True) for index in range(300)}
    asked = {repr(preference_example(0, index, PIECES).messages) for index in range(3000)}
    assert not asked & {
        preference_example(0, index, PIECES, unseen=True).messages[-1]["content"] for index in range(300)
    }


def test_no_training_question_is_about_a_held_out_subject():
    known, words = talk.SUBJECTS.split("|"), letters.words()
    for subject in talk.SUBJECTS_HELD_OUT:
        word = subject.split()[-1]
        assert subject not in known and (word not in words or held_out(f"word {word}"))


def test_what_the_test_has_in_common_with_training():
    assert overlap.distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2 and overlap.distance([], "ab") == 2
    unseen = list(unseen_examples(0, 110, PIECES))
    lines = {example.trace.partition("\n")[0] for example in unseen if example.problem.family == "sum"}
    assert [overlap.worked_inside(given, 0, 110, PIECES)["sum"] for given in (lines, set())] == [1, 0]
    trained = list(overlap.training_texts(0, 50, 2000, 50, PIECES))
    assert len(trained) == 2100
    inside = overlap.worked_inside({line for text in trained for line in text.split("\n")}, 0, 1100, PIECES)
    assert inside["product"] > 0 == inside["sort"]  # a story's first step is a product; nothing sorts on its way
    assert min(overlap.phrasing_distances("sum", questions=1)) >= 2
    seen = {overlap._row(0, index, PIECES) for index in range(500)}
    assert overlap.repeated_rows(seen, 0, 192, PIECES) == 0


def test_the_showcase_is_held_out():
    questions = {"word strawberry": Problem("count", (("Strawberry",), "r")), "sum 89 473": Problem("sum", (473, 89))}
    questions |= {"difference 512 77": Problem("difference", (512, 77)), "product 8 47": Problem("product", (47, 8))}
    questions["larger 9.11 9.9"] = Problem("larger", ("9.9", "9.11", "smaller"))
    assert set(questions) == SHOWCASE
    for key, problem in questions.items():
        assert FAMILIES[problem.family].keys(problem.facts) == [key] and is_test(problem)


def test_phrasings_of_the_test_are_never_trained():
    rng = Random(0)
    for family in FAMILIES.values():
        facts = draw(family, rng, test=False)
        trained = {family.ask(facts, Random(n), False) for n in range(200)}
        unseen = {family.ask(facts, Random(n), True) for n in range(200)}
        assert unseen and not trained & unseen


def test_examples_depend_on_seed_and_index_alone():
    once = [training_example(7, index, PIECES) for index in range(50)]
    assert once == [training_example(7, index, PIECES) for index in reversed(range(50))][::-1]
    assert once != [training_example(8, index, PIECES) for index in range(50)]


def test_every_kind_of_turn_occurs():
    examples = [training_example(0, index, PIECES) for index in range(1500)]
    assert {example.problem.family for example in examples if example.problem} == set(FAMILIES)
    assert any(example.problem is None for example in examples)
    assert any(len(example.messages) > 2 for example in examples)
    assert any(example.messages[0]["role"] == "system" for example in examples)
    assert any(not example.thinking for example in examples)
    assert any(example.thinking and not example.trace for example in examples)  # /no_think


# --- the tokenizer ---


def test_the_committed_tokenizer_is_what_the_code_makes():
    made = train()
    assert json.loads(made.to_str()) == json.loads((TINY / "tokenizer.json").read_text())
    assert tokenizer_config(made) == json.loads((TINY / "tokenizer_config.json").read_text())


def test_a_word_is_cut_the_same_way_wherever_it_stands():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for word in (*letters.words()[::97], "strawberry", "Mississippi"):
        pieces = PIECES(word)
        assert "".join(pieces) == word
        for text in (f'"{word}"', f"({word})", f"\n{word}:"):
            assert tokenizer.encode(text).tokens[1:-1] == pieces
        spaced = tokenizer.encode(f" {word}").tokens
        assert spaced in ([f"Ġ{pieces[0]}", *pieces[1:]], ["Ġ", *pieces])


def test_digits_stand_alone_and_keywords_are_whole():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.encode("473+89").tokens == ["4", "7", "3", "+", "8", "9"]
    for word in ("hundreds", "borrow", "Wednesday", "September"):
        assert tokenizer.encode(f" {word}").tokens == [f"Ġ{word}"]
    assert KEYWORDS


@pytest.mark.parametrize("text", ["naïve café 東京 🍓", "a\r\n\tb  c", "\x00\x7f", "e\u0301", "<|im_end|> <think>"])
def test_every_byte_comes_back(text):
    import unicodedata

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_transformers_opens_the_tokenizer():
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(TINY), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for example in unseen_examples(1, 22, PIECES):
        text = theirs.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
        assert theirs.encode(text) == ours.encode(text).ids
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"


@pytest.mark.skipif(not ASSETS, reason="NANOQWEN_ASSETS names no folder with the official files")
def test_the_template_writes_what_the_official_one_writes():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    official = json.loads((Path(ASSETS) / "qwen3-0.6b" / "tokenizer_config.json").read_text())["chat_template"]
    cases = json.loads((Path(ASSETS) / "chat_template_cases.json").read_text())
    for case in cases:
        made = tokenizer.apply_chat_template(case["messages"], tools=case.get("tools"), tokenize=False, **case["kw"])
        assert made == case["expected"], case["name"]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    conversations = [
        [{"role": "user", "content": "<tool_response>\nx\n</tool_response>"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call, call]}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "\n\nb", "reasoning_content": "\nc\n", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "<think>\nd\n</think>\n\ne"},
            {"role": "system", "content": "late"},
            {"role": "user", "content": "f"},
        ],
        [
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "</think>"},
        ],
    ]
    for messages in conversations:
        for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
            for kw in ({"add_generation_prompt": True}, {"enable_thinking": False, "add_generation_prompt": True}, {}):
                both = [
                    tokenizer.apply_chat_template(messages, tools=tools, chat_template=t, tokenize=False, **kw)
                    for t in (tokenizer.chat_template, official)
                ]
                assert both[0] == both[1]


def test_documents_for_pretraining_are_no_chats_and_hold_nothing_out():
    texts = [document(0, index, PIECES) for index in range(800)]
    assert texts[:9] == [document(0, index, PIECES) for index in range(9)]
    unseen = list(unseen_examples(0, 200, PIECES))
    shown = "\n".join(texts)
    assert "<|" not in shown and "<think>" not in shown and "\nones: " in shown
    assert not any(example.trace in shown for example in unseen if len(example.trace.splitlines()) > 2)
