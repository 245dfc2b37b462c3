"""A real corpus that every machine has: the sources and docstrings of Python's standard library, as JSON lines."""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests and bundled tools repeat themselves; site-packages are other people's.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "_vendor"}


def stdlib_documents() -> Iterator[dict[str, str]]:
    """{"path", "text"} of each module, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        if text.strip():
            yield {"path": str(relative), "text": text}


def main() -> None:
    """Write the corpus to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m based_megatron.data_prep.stdlib_corpus OUTPUT.jsonl")
    output = Path(sys.argv[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    documents = list(stdlib_documents())
    output.write_text("".join(json.dumps(document) + "\n" for document in documents))
    print(f"{output}: {len(documents)} modules, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
