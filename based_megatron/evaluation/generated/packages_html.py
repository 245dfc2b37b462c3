"""The task `packages_html`: a cell of a web page of packages (like SWDE)."""

import html
import random
from collections.abc import Iterator, Sequence
from itertools import islice

from based_megatron.evaluation.contexts import Asked
from based_megatron.evaluation.generated.packages import Package
from based_megatron.evaluation.generated.rows import Length, Row, guessable_values, row

QUESTIONS_A_PAGE = 8
LONGEST_DESCRIPTION = 120
"""Characters."""


def packages_html_rows(packages: Sequence[Package], size: int, length: Length, seed: int) -> Iterator[Row]:
    """Rows of pages with as many packages as fit into so many tokens; every package is on one page."""
    guessable = guessable_values(package.fields for package in packages)
    rng = random.Random(f"packages_html {seed} {size}")
    shuffled = list(packages)
    rng.shuffle(shuffled)
    for number, page in enumerate(_pages(shuffled, size, length)):
        document = "\n".join(map(_section, page))
        cells = [(package.name, *cell) for package in page for cell in package.fields.items()]
        rng.shuffle(cells)
        rows = (
            row(Asked(document, f"\n\nThe {key} of {name} is", value), key, f"page {number} {size}", size, length)
            for name, key, value in cells
            if (key, value.lower()) not in guessable
        )
        yield from islice(filter(None, rows), QUESTIONS_A_PAGE)


def _pages(packages: Sequence[Package], size: int, length: Length) -> Iterator[list[Package]]:
    """Pages of two packages at least: a page of one would not need the name."""
    page: list[Package] = []
    tokens = 0
    for package in packages:
        more = length("\n" + _section(package))
        if page and tokens + more > size:
            if len(page) > 1:
                yield page
            page, tokens = [], 0
        if more <= size:
            page, tokens = [*page, package], tokens + more
    if len(page) > 1:
        yield page


def _section(package: Package) -> str:
    # Quotes stay as they are, so that most values do.
    cells = [
        f"<tr><th>{key}</th><td>{html.escape(value, quote=False)}</td></tr>" for key, value in package.fields.items()
    ]
    text = html.escape(package.description[:LONGEST_DESCRIPTION], quote=False)
    return "\n".join([f"<h2>{html.escape(package.name)}</h2>", "<table>", *cells, "</table>", f"<p>{text}</p>"])
