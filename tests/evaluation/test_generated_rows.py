"""Generated tasks: what a row must be, how they are made on this machine, and how they are scored."""

import dataclasses
import json
import re
from collections.abc import Sequence

import pytest
from tiny_model import WORDS

from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import DataError
from based_megatron.evaluation.contexts import Asked
from based_megatron.evaluation.generated.packages import Package, debian_packages, python_packages
from based_megatron.evaluation.generated.packages_html import packages_html_rows
from based_megatron.evaluation.generated.rows import (
    Row,
    digest,
    guessable_values,
    majority_guesses,
    read_rows,
    row,
    to_json_lines,
)
from based_megatron.evaluation.generated.tasks import (
    cut_rows,
    distance_bin,
    generated_rows,
    rows_of_file,
    score_rows,
)
from based_megatron.evaluation.tasks import GENERATED
from based_megatron.inference.source import text_tokenizer

SIZES = (1500, 3000)
"""A token of this tokenizer is little more than a character."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS)] * 3, 300).save(folder)
    return text_tokenizer(folder)


@pytest.fixture(scope="module")
def made(tokenizer) -> dict[str, list[Row]]:
    """Some rows of each task."""
    return {task: generated_rows(task, tokenizer, () if task == "phonebook" else SIZES, limit=48) for task in GENERATED}


def words(text: str) -> int:
    return len(text.split())


def made_row(value: str, document: str = "Version: 1.2.3\nand more", question: str = "\n\nVersion:") -> Row | None:
    return row(Asked(document, question, value), "Version", "p", 512, words)


def test_a_row_measures_its_distances():
    found = made_row("1.2.3")
    assert found == Row("Version: 1.2.3\nand more\n\nVersion:", "1.2.3", "Version", "p", 4, 2, "\n\nVersion:", 512)


@pytest.mark.parametrize(
    ("value", "document", "question"),
    [
        ("1.2.3", "1.2.3 and 1.2.3", "q"),
        ("abc", "abc and ABC", "q"),
        ("abc", "no such value", "q"),
        ("abc", "the abc", "is it ABC?"),
        ("a", "a", "q"),
        ("x" * 61, "x" * 61, "q"),
        ("", "anything", "q"),
    ],
)
def test_values_that_are_not_once_in_the_document_give_no_row(value, document, question):
    assert made_row(value, document, question) is None


def rows_with(*values: str, key: str = "License") -> list[Row]:
    return [Row("t", value, key, f"doc {i}", 1, 1, "q", 1) for i, value in enumerate(values)]


def fields(*values: str) -> list[dict[str, str]]:
    return [{"License": value} for value in values]


def test_common_values_are_guessable():
    """The majority, and 6 of 106; not 5 of 106, nor a value of one document."""
    documents = fields(*["MIT"] * 60, *["BSD"] * 3, *["bsd"] * 3, *["zlib"] * 5, *(f"own {i}" for i in range(35)))
    assert guessable_values(documents) == {("License", "mit"), ("License", "bsd")}


def test_the_majority_is_guessable_however_rare_it_is():
    assert guessable_values(fields("a1", "a1", *(f"own {i}" for i in range(98)))) == {("License", "a1")}


def test_no_value_is_guessable_if_all_differ():
    assert guessable_values(fields("a1", "b2", "c3")) == frozenset()


def test_the_majority_is_that_of_other_documents():
    rows = rows_with("MIT", "MIT", "BSD")
    assert majority_guesses(rows)[2] == "MIT"
    assert majority_guesses(rows_with("only")) == [""]
    assert majority_guesses(rows_with("one", "two")) == ["two", "one"]


@pytest.mark.parametrize("task", GENERATED)
def test_rows_keep_the_rules_and_measure_what_they_say(made, tokenizer, task):
    rows = made[task]
    assert len(rows) == 48 and len({each.text for each in rows}) == 48

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    for each in rows:
        document = each.text.removesuffix(each.question)
        assert each.text == document + each.question
        assert document.lower().count(each.value.lower()) == 1 and 2 <= len(each.value) <= 60
        assert each.value.lower() not in each.question.lower()
        assert each.context_tokens == length(document)
        after = document[document.lower().index(each.value.lower()) + len(each.value) :]
        assert each.distance_tokens == length(after) < each.context_tokens
        if task == "phonebook":
            assert len(document.splitlines()) == each.size
        else:
            assert each.context_tokens <= each.size and each.size in SIZES
    assert len({each.size for each in rows}) == (6 if task == "phonebook" else 2)


def test_headers_stand_in_different_places(made):
    places = {each.doc.split()[-2] for each in made["metadata"]}
    assert places == {"start", "middle", "end"}
    assert all(f"\n{each.key}: {each.value}" in f"\n{each.text}" for each in made["metadata"])


def test_html_asks_for_a_cell_of_one_of_several_packages(made):
    for each in made["packages_html"]:
        sections = each.text.split("<h2>")[1:]
        key, name = re.fullmatch(r"\n\nThe (\S+) of (.+) is", each.question).groups()
        (section,) = [section for section in sections if section.startswith(f"{name}</h2>")]
        assert len(sections) > 1 and f"<tr><th>{key}</th><td>{each.value}</td></tr>" in section


def test_values_that_html_writes_otherwise_are_not_asked(tokenizer):
    packages = [Package(f"p{i}", {"Author": f"a & b {i}", "Version": f"{i}.75"}, "text") for i in range(8)]
    rows = list(packages_html_rows(packages, 200, words, seed=0))
    assert rows and {each.key for each in rows} == {"Version"}


@pytest.mark.parametrize("task", GENERATED)
def test_the_seed_fixes_the_rows_and_fewer_are_the_first_of_each_size(made, tokenizer, task):
    sizes = 6 if task == "phonebook" else 2
    rows = generated_rows(task, tokenizer, () if task == "phonebook" else SIZES, limit=2 * sizes)
    assert rows == [row for first in range(0, 48, 48 // sizes) for row in made[task][first : first + 2]]


def test_phone_books_keep_to_the_context(tokenizer):
    rows = generated_rows("phonebook", tokenizer, (400,), limit=40)
    assert max(each.context_tokens for each in rows) <= 400 and {each.size for each in rows} < {8, 16, 32, 64}


def test_a_machine_without_rows_is_told_what_to_do(tokenizer):
    with pytest.raises(DataError, match="--context"):
        generated_rows("phonebook", tokenizer, (5,))


def test_debian_packages_are_read(tmp_path):
    status = tmp_path / "status"
    status.write_text("Package: b\nVersion: 2-1\nDescription: one\n two\n\nPackage: a\nHomepage: https://a.org\n")
    assert debian_packages(status) == [
        Package("a", {"Homepage": "https://a.org"}, ""),
        Package("b", {"Version": "2-1"}, "one two"),
    ]
    assert debian_packages(tmp_path / "absent") == []
    assert "torch" in {package.name for package in python_packages()}


class Oracle:
    """Looks the number up, as a model with perfect recall does."""

    def write(self, prompts: Sequence[str], new_tokens: int, until: Sequence[str]) -> list[str]:
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: str) -> str:
        document, _, question = prompt.rpartition("\n\n")
        numbers = dict(line.split(": ") for line in document.splitlines() if ": " in line)
        return f" {numbers.get(question.removesuffix(':'), 'unknown')}"


class Guesser(Oracle):
    def answer(self, prompt: str) -> str:
        return " 1234567"


def scored(rows: list[Row], writer: Oracle, **options):
    settings = {"window": 128, "read_twice": False, "data": "here", "data_hash": "x"} | options
    return score_rows("phonebook", rows, writer, **settings)


def test_an_oracle_solves_the_phone_book_and_a_guesser_does_not(made):
    result, samples = scored(made["phonebook"], Oracle())
    assert result.metrics == {"contains": 1.0}
    assert result.baselines == {"no context": 0.0, "majority": 0.0}
    assert all(each.contains == 1 and each.no_context == 0 for each in result.slices)
    assert [sample["answer"].strip() for sample in samples] == [each.value for each in made["phonebook"]]
    assert scored(made["phonebook"], Guesser())[0].metrics == {"contains": 0.0}


def test_slices_cover_the_rows_by_size_and_by_distance(made):
    result, _ = scored(made["phonebook"], Oracle())
    sizes = [each for each in result.slices if each.name.startswith("documents of")]
    distances = [each for each in result.slices if each.name.startswith("distance")]
    assert sum(each.rows for each in sizes) == sum(each.rows for each in distances) == 48
    assert [each.name for each in sizes] == [f"documents of {n} lines" for n in (8, 16, 32, 64, 128, 256)]
    assert distances[0].name == "distance 0 to 128, inside the window"
    assert "beyond the window" in distances[-1].name


@pytest.mark.parametrize(
    ("distance", "window", "name"),
    [
        (0, 100, "distance 0 to 100, inside the window"),
        (100, 100, "distance 0 to 100, inside the window"),
        (101, 100, "distance 101 to 128, beyond the window"),
        (128, None, "distance 0 to 128"),
        (2049, None, "distance above 2048"),
        (-1, 100, ""),
    ],
)
def test_bins_of_distance(distance, window, name):
    bins = sorted({128, 512, 2048} | ({window} if window else set()))
    each = dataclasses.replace(rows_with("v")[0], distance_tokens=distance)
    assert distance_bin(each, bins, window) == name


def test_reading_twice_changes_the_prompts_only(made):
    rows = made["phonebook"]
    once, twice = scored(rows, Oracle())[0], scored(rows, Oracle(), read_twice=True)[0]
    assert twice.metrics == once.metrics and twice.prompt == "read twice"
    assert twice.prompt_hash != once.prompt_hash


def test_rows_come_back_from_their_file(made, tokenizer, tmp_path):
    text = to_json_lines(made["metadata"])
    (tmp_path / "validation.jsonl").write_text(text)
    assert read_rows(tmp_path / "validation.jsonl") == made["metadata"]
    assert rows_of_file(tmp_path, tokenizer, limit=5) == made["metadata"][:5]
    assert len(digest(text)) == 16 and digest(text) != digest(text + "\n")


def test_rows_of_text_and_value_are_divided_and_measured(tokenizer, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"text": "the home page one\n\nhome:", "value": "page"}, {"text": "two three\n\nname:", "value": "x"}]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    first, second = rows_of_file(file, tokenizer, limit=None)
    assert (first.question, first.value) == ("\n\nhome:", "page") and first.distance_tokens == len(
        tokenizer.encode(" one")
    )
    assert second.distance_tokens == -1, "its answer is not in the document"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("{x", "line 1 is no JSON"),
        ("[1]", "line 1 has no text, value"),
        ('{"text": "t", "value": "v"}\n{"text": "t"}', "line 2 has no value"),
        ('{"text": "t", "value": " "}', "empty value"),
        ('{"text": "t", "value": "v", "question": "q"}', "no key"),
        ("\udcff", "cannot read"),
    ],
)
def test_files_without_rows_are_refused(tokenizer, tmp_path, content, words):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=words):
        rows_of_file(file, tokenizer, limit=None)
    with pytest.raises(DataError, match=r"validation\.jsonl"):
        rows_of_file(tmp_path, tokenizer, limit=None)


def test_cut_rows_keep_their_answers(made, tokenizer):
    cut = cut_rows(made["metadata"], (64, 128), tokenizer)
    assert len(cut) == 2 * 48 and {each.size for each in cut} == {64, 128}
    for each in cut:
        assert each.value.lower() in each.text.lower() and each.distance_tokens >= 0
