"""The arrows between rooms are those of CONTRIBUTING.md: one table, read by people and by this test."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import based_megatron

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "based_megatron"
DOORS = {
    "megatron": "parallel/megatron.py",
    "deepspeed": "parallel/deepspeed.py",
    "lm_eval": "evaluation/harness.py",
    "datatrove": "data_prep/datatrove_tasks.py",
}
"""The one file that may import each library: what else it is used for goes through that file."""
ROOTS = {"", "errors"}
"""What any room may import: the version, and the errors of users."""


def product_files() -> dict[str, Path]:
    """Every Python file of the package, links to the top-level folders included, by its path below the package."""
    folders = [PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_symlink())]
    return {str(path.relative_to(PACKAGE)): path for folder in folders for path in folder.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports, anywhere in it. `from .x import y` stays inside its folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path} imports from a folder above its own"


def room(name: str) -> str:
    """The room of `train/step.py` or of `based_megatron.train.step.build_step`: `train`; "" for the package itself."""
    parts = name.removeprefix("based_megatron.").replace("/", ".").removesuffix(".py").split(".")
    inside = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file()
    return parts[0] if inside and parts[0] != "__init__" else ""


def arrows() -> dict[tuple[str, str], str]:
    """(importing room, imported room) to a file that shows it."""
    return {
        (room(file), room(name)): file
        for file, path in sorted(product_files().items())
        for name in imports(path)
        if name.split(".")[0] == "based_megatron" and room(name) != room(file) and room(name) not in ROOTS
    }


def documented() -> set[tuple[str, str]]:
    """The arrows of the table in CONTRIBUTING.md, whose rows are | `room` | `room`, `room` |."""
    text = (REPO / "CONTRIBUTING.md").read_text()
    table = text.partition("| room | imports |\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[1:]]
    assert rows, "CONTRIBUTING.md has no table of imports"
    return {
        (source, target)
        for sources, targets in rows
        for source in re.findall(r"`(\w+)`", sources)
        for target in re.findall(r"`(\w+)`", targets)
    }


def test_rooms_import_what_contributing_says_and_nothing_else():
    found, allowed = arrows(), documented()
    undocumented = {f"{source} -> {target} in {found[source, target]}" for source, target in found.keys() - allowed}
    assert not undocumented
    assert not {f"{source} -> {target}: no file needs it" for source, target in allowed - found.keys()}


def test_arrows_point_one_way():
    graph: dict[str, set[str]] = {}
    for source, target in documented():
        graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


@pytest.mark.parametrize("library", DOORS)
def test_one_file_imports(library):
    found = {file for file, path in product_files().items() if library in {n.split(".")[0] for n in imports(path)}}
    assert found == {DOORS[library]}


def test_the_version_stands_in_one_place():
    holders = [file for file, path in product_files().items() if f'"{based_megatron.__version__}"' in path.read_text()]
    assert holders == ["__init__.py"]
    assert 'dynamic = ["version"]' in (REPO / "pyproject.toml").read_text()
    assert f"version: {based_megatron.__version__}\n" in (REPO / "CITATION.cff").read_text()


def test_apex_is_never_a_requirement():
    """PyPI's package of that name is another one than NVIDIA's."""
    for name in ("pyproject.toml", "constraints.txt", "Dockerfile", "Makefile"):
        assert not re.search(r"(?mi)^[^#]*\bapex\s*([=<>~\"']|$)", (REPO / name).read_text()), name
