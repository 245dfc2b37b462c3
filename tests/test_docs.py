"""Pages of the repository: links between them and to files resolve, and the tour names what the files have."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TOUR = REPO / "docs" / "tour.md"
FOLDERS = ("", ".github", "benchmarks", "docs", "examples", "kernels", "tests")
"""Folders with pages; others, such as an environment in the clone, may hold pages of other people."""
PAGES = sorted(path for folder in FOLDERS for path in (REPO / folder).glob("**/*.md" if folder else "*.md"))
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_resolve(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A title, here\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#a-title-here) [b](there.md#other) [c](gone.md) [d](https://example.org/x)")
    assert dead_links(page) == ["there.md#other", "gone.md"]


def names_that_are_gone(tour: str) -> list[str]:
    """Names in code type that the file of their section does not have. A section's heading links to its file."""
    gone = []
    for section in re.split(r"^## ", tour, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if link := LINK.search(heading):
            names = re.findall(r"`([A-Za-z_]\w*)`", text)
            file = (TOUR.parent / link[1]).read_text()
            gone += [f"{name} in {link[1]}" for name in names if not re.search(rf"\b{name}\b", file)]
    return gone


def test_the_tour_names_what_is_there():
    tour = TOUR.read_text()
    assert names_that_are_gone(tour) == []
    assert len(re.findall(r"^## \d\. \[", tour, re.MULTILINE)) == 5


def test_a_name_that_is_gone_is_found():
    tour = "## 1. [a](../README.md): a page\n\n`based` and `no_such_name`\n\n## Then\n\n`neither_this`\n"
    assert names_that_are_gone(tour) == ["no_such_name in ../README.md"]
