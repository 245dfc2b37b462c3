"""Only a mixer's class says what the mixer is: no other file of the package decides by the letter of a pattern."""

import ast
from pathlib import Path

import based_megatron
from based_megatron.model.mixers import MIXERS

PACKAGE = Path(based_megatron.__file__).parent
ELSEWHERE = ("model/mixers/", "bench/")
"""The owners, and timings, which know what they time."""


def compared_letters(source: str) -> list[str]:
    """Letters of mixers that a file compares with something, or has as keys of a table."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            found += node.keys
    return [node.value for node in found if isinstance(node, ast.Constant) and node.value in MIXERS]


def test_decisions_by_a_letter_are_found():
    assert compared_letters("if letter == 'A' or 'S' in letters: x = {'c': 1, 'd': 2}") == ["A", "S", "c"]


def test_no_file_decides_by_a_letter():
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    assert len(files) > 80
    found = {
        name: letters
        for name, path in files.items()
        if not name.startswith(ELSEWHERE) and (letters := compared_letters(path.read_text()))
    }
    assert found == {}
