"""The words of CONTRIBUTING.md, as far as a machine can check them: docstrings, house words, letters of dimensions."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PRODUCT = ("based_megatron", "kernels", "launchers", "data_prep", "examples", "benchmarks")
LEGENDS = (
    "kernels",
    "based_megatron/model",
    "based_megatron/convert",
    "based_megatron/data",
    "based_megatron/inference",
    "based_megatron/evaluation",
    "examples",
)
"""Folders whose tensors have shape suffixes, and whose files say in a legend what the letters are."""
RIDDLES = re.compile(r"(Of|The same|Same|Likewise|As above|Ditto)\b")
"""Openings of a docstring that say what a thing belongs to or resembles, not what it is."""
HOUSE_WORDS = {
    "besides, next to or against": r"\bbeside\b",
    "fixed": r"\bmended\b",
    "skipped": r"\bpassed over\b",
    "logged or reported": r"\b(is|are|was|were) told\b",
    "rotated": r"\b(keys|heads|queries|pairs|dims)( [\w']+){0,3} turned\b",
    "chunk scan": r"\bchunk sweeps?\b",
    "buffered keys": r"\bwaiting keys\b",
    "boundary rows": r"\b(own|the) tail\b",
    "baselines": r"\bpeers\b",
    "all ranks": r"\beveryone\b",
}
"""What to write, and the word that it replaces in docstrings, comments and pages."""
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Zh0-9]*[A-Z][A-Zh0-9]*)$")


def python_files(*folders: str) -> list[Path]:
    """Files below these folders; links from one folder to another are read once, where they point."""
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py") if path.resolve() == path)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings: of modules, classes and functions, and the strings below fields and constants."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def riddles(source: str) -> list[tuple[int, str]]:
    return [(line, text.splitlines()[0]) for line, text in docstrings(source) if RIDDLES.match(text.strip())]


def house_words(text: str) -> list[str]:
    """What to write in place of the house words of a text. Code in backticks is not read: names are no words."""
    plain = re.sub(r"`[^`]*`", "", text)
    return [better for better, word in HOUSE_WORDS.items() if re.search(word, plain, re.IGNORECASE)]


def suffix_letters(source: str) -> dict[str, str]:
    """The letters of shape suffixes in a file's own names, each with a name that has it."""
    names = [node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    names += [node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.arg)]
    found = [(name, match[1]) for name in names if (match := SUFFIX.match(name))]
    return {letter: name for name, suffix in found for letter in suffix if letter.isalpha()}


def missing_in_legend(source: str) -> dict[str, str]:
    legend = (ast.get_docstring(ast.parse(source)) or "").partition("Legend:")[2]
    return {letter: name for letter, name in suffix_letters(source).items() if not re.search(rf"\b{letter}\b", legend)}


def letter_table() -> set[str]:
    return set(re.findall(r"^\| `(\w)` \|", (REPO / "CONTRIBUTING.md").read_text(), re.MULTILINE))


def pages() -> list[Path]:
    return [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "kernels").glob("*/README.md"))]


def test_docstrings_say_what_a_thing_is():
    found = [
        f"{path.relative_to(REPO)}:{line}: {text}"
        for path in python_files(*PRODUCT, "tests")
        for line, text in riddles(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_house_words_do_not_come_back():
    texts = [
        (f"{path.relative_to(REPO)}:{line}", text)
        for path in python_files(*PRODUCT)
        for line, text in [*docstrings(path.read_text()), *comments(path.read_text())]
    ]
    texts += [
        (f"{path.relative_to(REPO)}:{line}", text)
        for path in pages()
        for line, text in enumerate(path.read_text().splitlines(), start=1)
    ]
    found = [f"{where}: write {better}" for where, text in texts for better in house_words(text)]
    assert not found, "\n".join(found)


def test_the_table_of_letters_has_every_suffix():
    used = {
        letter: f"{name} in {path.relative_to(REPO)}"
        for path in python_files("kernels", "based_megatron", "examples")
        for letter, name in suffix_letters(path.read_text()).items()
    }
    assert {letter: where for letter, where in used.items() if letter not in letter_table()} == {}
    assert letter_table() - used.keys() == set(), "letters that no file uses"


@pytest.mark.parametrize("folder", LEGENDS)
def test_a_file_says_what_its_letters_are(folder):
    files = {str(path.relative_to(REPO)): missing_in_legend(path.read_text()) for path in python_files(folder)}
    assert files and {name: missing for name, missing in files.items() if missing} == {}


def test_what_is_wrong_is_found():
    source = '"""Legend: B batch, T tokens."""\n\n\ndef f(q_BTHF):\n    """The same for q."""\n'
    assert riddles(source) == [(5, "The same for q.")]
    assert missing_in_legend(source) == {"H": "q_BTHF", "F": "q_BTHF"}
    assert riddles('x = 1\n"""Of one row."""\n') == [(2, "Of one row.")]
    assert house_words("Keys are turned, beside what is passed over") == [
        "besides, next to or against",
        "skipped",
        "rotated",
    ]
    assert house_words("besides the `beside` of a name") == []
