"""Rows of generated tasks, and the rules that a row must keep so that only its document can give the answer."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from based_megatron.errors import DataError
from based_megatron.evaluation.contexts import Asked

SHORTEST_VALUE, LONGEST_VALUE = 2, 60
"""Characters of a value."""
MOST_COMMON_SHARE = 0.05
"""A value that more of its key's rows have can be guessed."""
Length = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Row:
    """A question whose answer stands once in the document before it."""

    text: str
    """The prompt: the document and the question."""
    value: str
    key: str
    doc: str
    """Name of the document."""
    context_tokens: int
    """Tokens of the document."""
    distance_tokens: int
    """Tokens from the end of the value to the question."""
    question: str
    size: int
    """What the document was made for: tokens, or lines of a phone book."""

    @property
    def asked(self) -> Asked:
        return Asked(self.text.removesuffix(self.question), self.question, self.value)


def row(asked: Asked, key: str, doc: str, size: int, length: Length) -> Row | None:
    """The row of a question, or None if its value breaks a rule: it occurs once in the document, not in the question, and has 2 to 60
    characters."""
    value, document = asked.value, asked.document
    place = document.lower().find(value.lower())
    rules = (
        SHORTEST_VALUE <= len(value) <= LONGEST_VALUE,
        document.lower().count(value.lower()) == 1,
        value.lower() not in asked.question.lower(),
    )
    if not all(rules):
        return None
    distance = length(document[place + len(value) :])
    return Row(asked.text, value, key, doc, length(document), distance, asked.question, size)


def guessable_values(documents: Iterable[Mapping[str, str]]) -> frozenset[tuple[str, str]]:
    """(key, value in lower case) that one can guess without a document, out of the fields of all documents.

    They are the most common value of each key, and those of more than 5 % of the documents that have the key. A value that only one
    document has is never guessable.
    """
    counts: dict[str, Counter[str]] = {}
    for document in documents:
        for key, value in document.items():
            counts.setdefault(key, Counter())[value.lower()] += 1
    return frozenset(
        (key, value)
        for key, of_key in counts.items()
        for value, count in of_key.items()
        if count > 1 and (count == max(of_key.values()) or count > MOST_COMMON_SHARE * of_key.total())
    )


def majority_guesses(rows: Sequence[Row]) -> list[str]:
    """For each row the most common value of its key in other documents; empty if there is none."""
    counts: dict[str, Counter[str]] = {}
    for key, value, _ in dict.fromkeys((each.key, each.value, each.doc) for each in rows):
        counts.setdefault(key, Counter())[value] += 1
    own: dict[tuple[str, str], set[str]] = {}
    for each in rows:
        own.setdefault((each.key, each.doc), set()).add(each.value)

    def guess(each: Row) -> str:
        here = own[each.key, each.doc]
        others = ((value, count - (value in here)) for value, count in counts[each.key].items())
        value, count = max(others, key=lambda pair: pair[1])
        return value if count else ""

    return [guess(each) for each in rows]


def to_json_lines(rows: Sequence[Row]) -> str:
    """Text of the file that holds the rows."""
    return "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in rows)


def read_objects(path: Path, names: Iterable[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The objects of a file, one a line, that have all these names, and some text as value. Raises DataError."""
    found = []
    try:
        lines = path.read_text().splitlines()[:limit]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            each = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is no JSON: {error}") from error
        missing = [name for name in names if not isinstance(each, dict) or name not in each]
        if missing or not str(each["value"]).strip():
            what = f"no {', '.join(missing)}" if missing else "an empty value"
            raise DataError(f"{path} line {number} has {what}: a row needs at least text and value")
        found.append(each)
    if not found:
        raise DataError(f"{path} has no rows: one JSON object a line, with text and value")
    return found


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Rows that `to_json_lines` wrote. Raises DataError if the file has other rows or none."""
    names = [field.name for field in fields(Row)]
    return [Row(**{name: each[name] for name in names}) for each in read_objects(path, names, limit)]


def digest(text: str) -> str:
    """Start of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
