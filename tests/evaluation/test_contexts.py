"""Documents and questions: where a prompt divides, windows that keep the answer whole, and the score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import WORDS

from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.evaluation.contexts import Asked, contains, divided, window_around_answer
from based_megatron.inference.source import text_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS)] * 3, 300).save(folder)
    return text_tokenizer(folder)


def length(tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("answer", "value", "found"),
    [
        (" 1.2.3 or so", "1.2.3", True),
        (" ANNA", "anna", True),
        (" 1x2x3", "1.2.3", False),
        ("", "a", False),
        (" An", "Anna", False),
    ],
)
def test_contains_takes_the_value_literally_in_any_case(answer, value, found):
    assert contains(answer, value) is found


@pytest.mark.parametrize(
    ("text", "key", "document", "question"),
    [
        ("Version: 1\nbla bla\n\nVersion:", "Version", "Version: 1\nbla bla", "\n\nVersion:"),
        (
            "a b c\nthe version is here. So the Version is",
            "version",
            "a b c\nthe version is here. So the",
            " Version is",
        ),
        ("line one\nname of it:", "", "line one", "\nname of it:"),
        ("He came. He saw. He", "", "He came. He saw.", " He"),
        ("one two three", "", "one two", " three"),
        ("one", "", "", "one"),
    ],
)
def test_a_prompt_divides_before_its_question(text, key, document, question):
    asked = divided(text + "\n", " v ", key)
    assert (asked.document, asked.question, asked.value) == (document, question, "v")
    assert asked.text == text


def test_a_document_is_read_twice_and_asked_once():
    assert Asked("doc", "\n\nq:", "v").read_twice() == "doc\n\ndoc\n\nq:"


@given(st.integers(0, 60), st.integers(1, 70))
def test_windows_hold_the_answer_and_as_many_tokens_as_asked(tokenizer, place, tokens):
    words = [WORDS[i % len(WORDS)] for i in range(60)]
    document = " ".join([*words[:place], "Qxz9", *words[place:]])
    whole = Asked(document, "\n\nq:", "qxz9")
    asked = window_around_answer(whole, tokens, tokenizer)
    assert asked.document in document and "Qxz9" in asked.document
    assert (asked.question, asked.value) == (whole.question, whole.value)
    answer, total = length(tokenizer, " Qxz9"), length(tokenizer, document)
    # A token at the edge of a window may be cut otherwise than inside the document.
    assert abs(length(tokenizer, asked.document) - max(min(tokens, total), answer)) <= 2


def test_the_answer_stands_in_the_middle_of_its_window(tokenizer):
    document = " ".join(["one"] * 100 + ["Qxz9"] + ["one"] * 100)
    cut = window_around_answer(Asked(document, "", "Qxz9"), 50, tokenizer).document
    before, _, after = cut.partition("Qxz9")
    assert abs(length(tokenizer, before) - length(tokenizer, after)) <= 4


def test_a_document_without_the_answer_keeps_its_end(tokenizer):
    document = " ".join([*["one"] * 50, "two"])
    cut = window_around_answer(Asked(document, "", "absent"), 10, tokenizer).document
    assert document.endswith(cut) and length(tokenizer, cut) == 10
