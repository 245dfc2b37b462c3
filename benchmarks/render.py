"""Write the Markdown table of a report of `based bench` again, from its JSON.

python -m benchmarks.render benchmarks/results/h200-*.json benchmarks/results/h100-prefill.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from based_megatron.bench.report import Report
from based_megatron.bench.table import to_markdown


def main(paths: Sequence[str]) -> None:
    """Write NAME.md next to each NAME.json."""
    for path in map(Path, paths):
        path.with_suffix(".md").write_text(rendered(path))


def rendered(path: Path) -> str:
    """The table of a JSON file, and how it was made."""
    command = f"python -m benchmarks.render benchmarks/results/{path.name}"
    return f"{to_markdown(read_report(path))}\nThis page is [{path.name}]({path.name}) as `{command}` writes it.\n"


def read_report(path: Path) -> Report:
    """A report that `based bench` has written."""
    return TypeAdapter(Report).validate_python(json.loads(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
