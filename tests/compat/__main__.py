"""What people do with an export, tried on a tiny one, and a table of it.

    pip install -e '.[compat]'
    python tests/compat                                    # all uses; names of uses after it: those alone
    python tests/compat --output docs/exports-tried.md     # write the table there
    python tests/compat --versions DIR ...                 # loading and generation with other versions of transformers too

DIR is made by `pip install --no-deps --target DIR transformers==5.17.0`. The uses of one file run in a process of their own, on the CPU, in
which nothing of based_megatron can be imported: an export must do without.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
GROUPS = ("uses_loading", "uses_generation", "uses_graphs", "uses_training", "uses_evaluation")
OF_VERSIONS = ("uses_loading", "uses_generation")
"""What is tried with every version of transformers."""
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "datasets", "lm_eval")
TIMEOUT_SECONDS = 1800
MISSING = "not installed: "


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/compat", description="Try what people do with an export.")
    parser.add_argument("uses", nargs="*", help="names of uses; all by default")
    parser.add_argument("--output", type=Path, help="file to write the table to")
    parser.add_argument(
        "--versions", type=Path, nargs="*", default=[], help="folders with other versions of transformers"
    )
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.group:
        run_group(arguments.group, arguments.export, arguments.uses)
        return 0
    from tiny_export import tiny_export  # takes based_megatron, which a group must not have

    with tempfile.TemporaryDirectory() as folder:
        export = arguments.export or tiny_export(Path(folder))
        rows = [row for group in GROUPS for row in in_process(group, export, arguments.uses)]
        columns = {read_version(path): list(of_version(path, export, arguments.uses)) for path in arguments.versions}
    text = table(rows, columns)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    faults = [fault for found in (rows, *columns.values()) for _, _, fault in found]
    return int(any(fault and not fault.startswith(MISSING) for fault in faults))


def in_process(
    group: str, export: Path, uses: Sequence[str], environment: dict[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """(name, what was tried, what went wrong) of the uses of a group."""
    words = [sys.executable, str(HERE), "--group", group, "--export", str(export), *uses]
    print(f"{group} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
    )
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith('["')]
    return found if done.returncode == 0 else [*found, (group, f"all of {group}", f"exit code {done.returncode}")]


def run_group(group: str, export: Path, uses: Sequence[str]) -> None:
    """Try the uses of a group, a line of JSON for each."""
    sys.modules["based_megatron"] = None  # type: ignore[assignment]
    for use in importlib.import_module(group).USES:
        if not uses or use.__name__ in uses:
            with tempfile.TemporaryDirectory() as tmp:
                print(json.dumps([use.__name__, use.__doc__.strip(), tried(use, export, Path(tmp))]), flush=True)


def tried(use, export: Path, tmp: Path) -> str:
    """What went wrong, in a line; empty if nothing did."""
    try:
        use(export, tmp)
    except ImportError as error:
        return f"{MISSING}{error.name}"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def read_version(folder: Path) -> str:
    return next(iter(metadata.distributions(name="transformers", path=[str(folder)]))).version


def of_version(folder: Path, export: Path, uses: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The uses of loading and generation with the transformers of a folder."""
    path = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
    for group in OF_VERSIONS:
        yield from in_process(group, export, uses, {"PYTHONPATH": path})


def table(rows: Sequence[tuple[str, str, str]], columns: dict[str, list[tuple[str, str, str]]]) -> str:
    """Two tables in Markdown: each use, and versions of transformers."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if _is_here(name))
    lines = [
        "# Uses of an export that were tried",
        "",
        f"Made by `python tests/compat` ([exports](exports.md)) on a CPU, with {versions}.",
        "",
        "| use | |",
        "|---|---|",
        *(f"| {what} | {fault or 'works'} |" for _, what, fault in rows),
    ]
    if columns:
        lines += [
            "",
            "Loading and generation with other versions of transformers:",
            "",
            "| transformers | |",
            "|---|---|",
        ]
    for version, found in columns.items():
        faults = [f"{name}: {fault}" for name, _, fault in found if fault]
        lines.append(f"| {version} | {len(found) - len(faults)} of {len(found)} work{_after('; ', faults)} |")
    return "\n".join(lines) + "\n"


def _after(separator: str, words: Sequence[str]) -> str:
    return "".join(separator + word for word in words)


def _is_here(name: str) -> bool:
    return next(iter(metadata.distributions(name=name)), None) is not None


if __name__ == "__main__":
    sys.exit(main())
