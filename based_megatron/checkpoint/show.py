"""Checkpoints in words, for `based ckpt`."""

from datetime import datetime
from math import prod
from pathlib import Path

from based_megatron.checkpoint.load import MODEL, read_state, stored_shapes
from based_megatron.checkpoint.manifest import MANIFEST, listed, missing_bytes
from based_megatron.checkpoint.ranks import ALONE
from based_megatron.checkpoint.store import FOLDER, is_gone, named_checkpoints, verify
from based_megatron.errors import CheckpointError


def show_run(run: Path) -> int:
    """List the checkpoints of a run folder, newest first, and what has the name of one but is none.

    Sizes of files are looked at, their bytes are not.
    """
    for path in _listed(run):
        entries, wrong = listed(path)
        wrong = wrong or missing_bytes(path, entries)
        if wrong and is_gone(path):  # by a run that goes on
            continue
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            print(f"{path.name}  damaged: {wrong[0]}{more}  {path}")
            continue
        size_bytes = sum(entry.size_bytes for entry in entries)
        try:
            state = read_state(path)
            saved_at = datetime.fromisoformat(state["saved_at"]).astimezone().strftime("%Y-%m-%d %H:%M")
            kind = "weights only" if state["kinds"] == [MODEL] else "training"
            line = f"step {state['step']:>9,}  {size_bytes / 1e9:9.3f} GB  {saved_at}  {kind:12}  {path}"
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            line = f"{path.name}  damaged: {error}  {path}"
        print(line)
    return 0


def show_checkpoint(path: Path, tensors: bool) -> int:
    """Show the state of a checkpoint (a run folder means its newest), and with --tensors every parameter."""
    complete = [found for found in _listed(path) if (found / MANIFEST).is_file()]
    if not complete:
        raise CheckpointError(f"no checkpoint in {path} has a {MANIFEST}: see `based ckpt verify`")
    path = complete[0]
    state = read_state(path)
    shapes = {
        name.removeprefix(f"{MODEL}."): shape for name, shape in stored_shapes(path).items() if name.startswith(MODEL)
    }
    print(f"{path}\nparameters: {sum(map(prod, shapes.values())):,} in {len(shapes)} tensors")
    _print_nested(state)
    if tensors:
        for name, shape in shapes.items():
            print(f"{name:60} {' x '.join(map(str, shape))}")
    return 0


def show_damage(path: Path) -> int:
    """Compare the files of a checkpoint, or of all of a run, with their manifest; exit code 1 if one differs."""
    damaged = 0
    for checkpoint in _listed(path):
        wrong = verify(checkpoint, ALONE)
        if wrong and is_gone(checkpoint):  # by a run that goes on
            continue
        damaged += bool(wrong)
        print(f"{checkpoint}: {'; '.join(wrong) or 'ok'}")
    return 1 if damaged else 0


def _listed(path: Path) -> list[Path]:
    """The checkpoint itself, under whatever name, or all of a run."""
    if (path / MANIFEST).is_file():
        return [path]
    found = named_checkpoints(path / FOLDER if (path / FOLDER).is_dir() else path)
    if not found:
        raise CheckpointError(f"no checkpoint in {path}: give a run folder or a checkpoint of one")
    return found


def _print_nested(values: dict, indent: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_nested(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value}")
