"""How surveys of corpora look: a page of HTML without anything to load, and a table for a terminal."""

from collections.abc import Iterator, Sequence
from html import escape

from rich.table import Table

from based_megatron.data.survey import Survey
from based_megatron.monitor.words import human

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } h2 { margin-top: 2em; overflow-wrap: anywhere }
.bar { display: flex; align-items: center; gap: .6em } .bar span { width: 9em; text-align: right; flex: none }
.bar i { background: #4477aa; height: 1em; flex: none }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .7em; overflow-wrap: anywhere }
"""
BAR_EM = 30


def facts(survey: Survey) -> dict[str, str]:
    """What is said of a corpus in numbers, by name."""
    documents = max(1, survey.sampled_documents)
    return {
        **{f"{name} tokens": human(count) for name, count in survey.tokens.items()},
        **{f"{name} documents": human(count) for name, count in survey.documents.items()},
        "tokens of a document, mean / median": f"{survey.mean_tokens:.0f} / {survey.median_tokens:.0f}",
        "duplicate documents": f"{survey.duplicates / documents:.2%}",
        "duplicate tokens": f"{survey.duplicate_tokens / max(1, survey.sampled_tokens):.2%}",
        "bytes a token": f"{survey.bytes_per_token:.2f}",
        "tokens a word": f"{survey.tokens_per_word:.2f}",
        "skipped": ", ".join(f"{count} {reason}" for reason, count in survey.skipped.items()) or "nothing",
        "sample": f"{survey.sampled_blocks:,} of {survey.blocks:,} blocks, {human(survey.sampled_documents)} documents",
    }


def table(surveys: Sequence[Survey]) -> Table:
    """A row for each fact, a column for each corpus."""
    rows = Table(box=None, pad_edge=False)
    rows.add_column("")
    for survey in surveys:
        rows.add_column(survey.folder, justify="right", overflow="fold")
    columns = [facts(survey) for survey in surveys]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.add_row(name, *(column.get(name, "") for column in columns))
    for least in sorted({least for survey in surveys for least, _ in survey.lengths}):
        counts = [dict(survey.lengths).get(least, 0) for survey in surveys]
        rows.add_row(f"documents of {_bin(least)} tokens", *map(human, counts))
    return rows


def page(surveys: Sequence[Survey]) -> str:
    """The page."""
    total = sum(survey.tokens["train"] for survey in surveys)
    shares = [(survey.folder, survey.tokens["train"]) for survey in surveys]
    corpora = "1 prepared corpus" if len(surveys) == 1 else f"{len(surveys)} prepared corpora"
    body = [f"<h1>{corpora}, {human(total)} training tokens</h1>", *_bars(shares)]
    for survey in surveys:
        rows = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts(survey).items())
        body += [f"<h2>{escape(survey.folder)}</h2>", "<table>", *rows, "</table>", "<h3>Documents by tokens</h3>"]
        body += _bars([(_bin(least), count) for least, count in survey.lengths])
        body += ["<h3>Beginnings of documents</h3>"]
        body += [f"<p>{escape(origin)}</p><pre>{escape(text)}</pre>" for origin, text in survey.samples]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Corpora</title><style>{STYLE}</style></head>'
    return "\n".join([head, "<body>", *body, "</body></html>", ""])


def _bars(counts: Sequence[tuple[str, int]]) -> Iterator[str]:
    most = max([1, *(count for _, count in counts)])
    for name, count in counts:
        width = BAR_EM * count / most
        yield f'<div class="bar"><span>{escape(name)}</span><i style="width:{width:.2f}em"></i>{human(count)}</div>'


def _bin(least: int) -> str:
    return f"{least:,}" if least == 1 else f"{least:,}-{2 * least - 1:,}"
