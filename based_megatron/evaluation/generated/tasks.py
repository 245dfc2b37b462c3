"""Generated tasks, and files of rows in their form: made or read, asked and scored."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from based_megatron.errors import DataError
from based_megatron.evaluation.contexts import Asked, contains, divided, window_around_answer
from based_megatron.evaluation.generated.metadata import metadata_rows
from based_megatron.evaluation.generated.packages import debian_packages, python_packages
from based_megatron.evaluation.generated.packages_html import packages_html_rows
from based_megatron.evaluation.generated.phonebook import LINES, phonebook_rows
from based_megatron.evaluation.generated.rows import Row, digest, majority_guesses, read_objects, read_rows
from based_megatron.evaluation.models import Writer
from based_megatron.evaluation.report import Slice, TaskResult

VERSION = "1"
"""Version of the prompts, the rules and the score."""
SIZES_TOKENS = (512, 1024, 2048)
ROWS_A_SIZE = 200
SEED = 1234
NEW_TOKENS = 48
UNTIL = ("\n",)
DISTANCES_TOKENS = (128, 512, 2048)
"""Upper bounds of the bins of distance, besides the model's window."""


def generated_rows(
    task: str, tokenizer: PreTrainedTokenizerFast, contexts: Sequence[int] = (), limit: int | None = None
) -> list[Row]:
    """Rows of a generated task, from what is installed on this machine, in an order that only the seed decides.

    contexts: sizes of documents in tokens; a phone book keeps its lines, and is left out where it is longer. limit: rows at most.
    Raises DataError where this machine has nothing to make rows of.
    """

    @functools.lru_cache(maxsize=64)  # each document is asked about several times
    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    packages = python_packages() if task == "metadata" else debian_packages() or python_packages()

    def of_size(size: int) -> Iterator[Row]:
        if task == "phonebook":
            return phonebook_rows(size, length, SEED)
        if task == "metadata":
            return metadata_rows(packages, size, tokenizer, length, SEED)
        return packages_html_rows(packages, size, length, SEED)

    sizes: Sequence[int] = tuple(contexts) or SIZES_TOKENS
    if task == "phonebook":
        longest = max(contexts, default=0)
        sizes = [lines for lines in LINES if not longest or next(of_size(lines)).context_tokens <= longest]
    most = ROWS_A_SIZE if limit is None else min(ROWS_A_SIZE, -(-limit // max(1, len(sizes))))
    rows = [row for size in sizes for row in islice(of_size(size), most)]
    if not rows:
        raise DataError(
            f"nothing here makes rows for the task {task}: put {task}.jsonl of another machine into --data, or set --context"
        )
    return rows[:limit]


def rows_of_file(path: Path, tokenizer: PreTrainedTokenizerFast, limit: int | None) -> list[Row]:
    """Rows that `based eval` wrote, or rows of any text and value. Raises DataError."""
    file = next((path / name for name in ("validation.jsonl", "test.jsonl") if (path / name).is_file()), path)
    if not file.is_file():
        raise DataError(f"{path} has no validation.jsonl: one row a line, with text and value")
    objects = read_objects(file, ("text", "value"), limit)
    if "question" in objects[0]:
        return read_rows(file, limit)
    asked = (divided(str(each["text"]), str(each["value"]), str(each.get("key", ""))) for each in objects)
    return [_measured(*pair, tokenizer) for pair in zip(asked, objects, strict=True)]


def _measured(asked: Asked, row: dict[str, object], tokenizer: PreTrainedTokenizerFast) -> Row:
    place = asked.document.lower().find(asked.value.lower())
    after = asked.document[place + len(asked.value) :] if place >= 0 else None

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return Row(
        text=asked.text,
        value=asked.value,
        key=str(row.get("key", "")),
        doc=str(row.get("doc", row.get("doc_id", ""))),
        context_tokens=length(asked.document),
        distance_tokens=-1 if after is None else length(after),
        question=asked.question,
        size=0,
    )


def cut_rows(rows: Sequence[Row], contexts: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """The rows once for each context, their documents cut to so many tokens around the answer."""
    cut = []
    for tokens in contexts:
        for row in rows:
            asked = window_around_answer(row.asked, tokens, tokenizer)
            measured = _measured(asked, {"key": row.key, "doc": row.doc}, tokenizer)
            cut.append(dataclasses.replace(measured, size=tokens))
    return cut


def score_rows(
    task: str, rows: Sequence[Row], writer: Writer, *, window: int | None, read_twice: bool, data: str, data_hash: str
) -> tuple[TaskResult, list[dict[str, object]]]:
    """Ask every row, with its document and without it. Returns the result, without its costs, and the answers.

    window: keys that sliding window attention sees, for the bins of distance.
    """
    prompts = [row.asked.read_twice() if read_twice else row.text for row in rows]
    answers = writer.write(prompts, NEW_TOKENS, UNTIL)
    blind = writer.write([row.question for row in rows], NEW_TOKENS, UNTIL)
    hits = [contains(answer, row.value) for answer, row in zip(answers, rows, strict=True)]
    blind_hits = [contains(answer, row.value) for answer, row in zip(blind, rows, strict=True)]
    guesses = [contains(guess, row.value) for guess, row in zip(majority_guesses(rows), rows, strict=True)]

    def slices(name_of: Callable[[Row], str]) -> Iterable[Slice]:
        for name in dict.fromkeys(map(name_of, sorted(rows, key=lambda row: (row.size, row.distance_tokens)))):
            inside = [i for i, row in enumerate(rows) if name_of(row) == name]
            if name:
                yield Slice(name, len(inside), _mean([hits[i] for i in inside]), _mean([blind_hits[i] for i in inside]))

    unit = "lines" if task == "phonebook" else "tokens"
    bins = sorted({*DISTANCES_TOKENS, *([window] if window else [])})
    by_distance = sorted(rows, key=lambda row: row.distance_tokens)
    order = list(dict.fromkeys(distance_bin(row, bins, window) for row in by_distance))
    of_distance = sorted(slices(lambda row: distance_bin(row, bins, window)), key=lambda each: order.index(each.name))
    result = TaskResult(
        task=task,
        version=VERSION,
        rows=len(rows),
        metrics={"contains": _mean(hits)},
        standard_errors={"contains": statistics.stdev(map(float, hits)) / len(hits) ** 0.5} if len(hits) > 1 else {},
        data=data,
        data_hash=data_hash,
        prompt_hash=digest("\0".join(prompts)),
        prompt="read twice" if read_twice else "",
        baselines={"no context": _mean(blind_hits), "majority": _mean(guesses)},
        slices=[*slices(lambda row: f"documents of {row.size} {unit}" if row.size else ""), *of_distance],
    )
    samples: list[dict[str, object]] = [
        {
            "key": row.key,
            "doc": row.doc,
            "value": row.value,
            "answer": answer,
            "contains": hit,
            "without_context": other,
        }
        for row, answer, hit, other in zip(rows, answers, hits, blind, strict=True)
    ]
    return result, samples


def distance_bin(row: Row, bins: Sequence[int], window: int | None) -> str:
    """The bin of a row's distance between value and question; empty for an answer that is not in the document."""
    if row.distance_tokens < 0:
        return ""
    upper = next((bound for bound in bins if row.distance_tokens <= bound), None)
    lower = max((bound for bound in bins if bound < row.distance_tokens), default=-1)
    name = f"distance above {lower}" if upper is None else f"distance {lower + 1} to {upper}"
    if window:
        name += ", inside the window" if row.distance_tokens <= window else ", beyond the window"
    return name


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
