"""Checkpoints of a run on disk: their names, which one to resume from, which ones to delete.

run_dir/checkpoints/
  step-00001000/          complete: it was renamed to this after everything in it was on the disk
    .metadata  __0_0.distcp  __1_0.distcp ...   tensors, in the format of torch.distributed.checkpoint
    state.json            step, tokens, Adam's step, known past of carried states, data fingerprint, config, versions
    manifest.json         size and hash of every file above
  step-00002000.tmp/      being written, or left by a run that was killed
  step-00001000.old/      replaced by a new checkpoint of the same step; used only if that one is damaged
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from based_megatron.checkpoint.manifest import MANIFEST, problems
from based_megatron.checkpoint.ranks import Ranks, all_ranks
from based_megatron.errors import CheckpointError
from based_megatron.run_folder.files import CHECKPOINTS as FOLDER
from based_megatron.run_folder.files import ROLLED_BACK

STATE = "state.json"
_COMPLETE = re.compile(r"step-(\d{8,})(\.old)?")


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Step of a checkpoint folder."""
    match = _COMPLETE.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name must be like {step_name(1000)}")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder by name, newest first; their files are not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint by name, or None."""
    return next(iter(list_checkpoints(folder)), None)


def verify(path: Path, ranks: Ranks | None = None) -> list[str]:
    """Faults of a checkpoint's files, none if it is whole; the ranks share the hashing (collective)."""
    ranks = ranks or all_ranks()
    shares = ranks.together(lambda: problems(path, ranks.rank, ranks.size))
    return list(dict.fromkeys(problem for share in shares for problem in share))


def newest_valid(
    folder: Path, on_skip: Callable[[str], None], ranks: Ranks | None = None, latest_step: int | None = None
) -> Path | None:
    """The newest checkpoint whose files are as written, or None if there is no checkpoint at all (collective).

    latest_step: leave those of later steps out.

    Damaged ones are skipped and reported to `on_skip` on rank 0, one line each. Raises CheckpointError if all are
    damaged: whether to start over in their place is for the user to decide.
    """
    ranks = ranks or all_ranks()
    candidates = ranks.on_first(lambda: list_checkpoints(folder))
    if latest_step is not None:
        candidates = [path for path in candidates if step_of(path) <= latest_step]
    for path in candidates:
        wrong = verify(path, ranks)
        if not wrong:
            return path
        if ranks.rank == 0:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            on_skip(f"checkpoint {path} is damaged and was skipped: {wrong[0]}{more}")
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged: restore one, or choose another --run-dir"
        )
    return None


def resolve_checkpoint(path: Path, on_skip: Callable[[str], None], ranks: Ranks | None = None) -> Path:
    """The checkpoint that a path names: itself, or the newest valid one of a run or checkpoints folder (collective).

    Raises CheckpointError if there is none, or if the checkpoint named is damaged.
    """
    ranks = ranks or all_ranks()
    if ranks.on_first(lambda: (path / MANIFEST).is_file()):
        if wrong := verify(path, ranks):
            raise CheckpointError(f"checkpoint {path} is damaged: {wrong[0]}")
        return path
    folder = ranks.on_first(lambda: path / FOLDER if (path / FOLDER).is_dir() else path)
    found = newest_valid(folder, on_skip, ranks)
    if found is None:
        raise CheckpointError(f"no checkpoint in {path}: give a run folder or a {step_name(1000)} folder of one")
    return found


def set_aside(folder: Path, step: int) -> None:
    """Move the checkpoints of later steps to the folder ROLLED_BACK: no run resumes from them, and none is lost. On one rank.

    Raises CheckpointError if that fails.
    """
    later = [path for path in list_checkpoints(folder) if step_of(path) > step]
    try:
        for path in later:
            aside = folder.parent / ROLLED_BACK / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    except OSError as error:
        raise CheckpointError(f"cannot move a checkpoint aside: {error}") from error


def prune(folder: Path, keep_last: int, saved: Path) -> list[Path]:
    """Delete what a new checkpoint `saved` makes superfluous, on one rank; returns the checkpoints deleted.

    `saved` and the keep_last - 1 newest before it stay (0 keeps all), and so do later steps, which only an earlier run
    that went further can have left. Remains of unfinished saves go. Raises CheckpointError if a deletion fails.
    """
    before = [path for path in list_checkpoints(folder) if step_of(path) < step_of(saved)]
    doomed = before[keep_last - 1 :] if keep_last > 0 else []
    try:
        for leftover in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
            shutil.rmtree(leftover)
        for path in doomed:
            unlisted = path.with_name(path.name + ".tmp")
            os.rename(path, unlisted)  # so that a half-deleted one is never taken for a checkpoint
            shutil.rmtree(unlisted)
    except OSError as error:
        raise CheckpointError(f"cannot delete an old checkpoint: {error}") from error
    return doomed
