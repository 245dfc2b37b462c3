"""Checkpoints in words, for `based ckpt`."""

from datetime import datetime
from math import prod
from pathlib import Path

from based_megatron.checkpoint.load import MODEL, read_state, stored_shapes
from based_megatron.checkpoint.manifest import read_manifest
from based_megatron.checkpoint.ranks import ALONE
from based_megatron.checkpoint.store import FOLDER, list_checkpoints, step_of, verify
from based_megatron.errors import CheckpointError


def show_run(run: Path) -> int:
    """List the checkpoints of a run folder, newest first."""
    for path in _listed(run):
        try:
            size_bytes = sum(entry.size_bytes for entry in read_manifest(path))
            state = read_state(path)
        except (OSError, ValueError, CheckpointError) as error:
            print(f"step {step_of(path):>9,}  damaged: {error}")
            continue
        saved_at = datetime.fromisoformat(state["saved_at"]).astimezone().strftime("%Y-%m-%d %H:%M")
        kind = "weights only" if state["kinds"] == [MODEL] else "training"
        print(f"step {step_of(path):>9,}  {size_bytes / 1e9:9.3f} GB  {saved_at}  {kind:12}  {path}")
    return 0


def show_checkpoint(path: Path, tensors: bool) -> int:
    """Show the state of a checkpoint (a run folder means its newest), and with --tensors every parameter."""
    path = _listed(path)[0]
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
        damaged += bool(wrong)
        print(f"{checkpoint}: {'; '.join(wrong) or 'ok'}")
    return 1 if damaged else 0


def _listed(path: Path) -> list[Path]:
    """The checkpoint itself, or all of a run."""
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = list_checkpoints(folder) or [p for p in list_checkpoints(path.parent) if p == path]
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
