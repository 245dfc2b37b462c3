"""Checkpoints of a run on disk: their names, which one to resume from, which ones to delete.

run_dir/checkpoints/
  step-00001000/          complete: it was renamed to this after everything in it was on the disk
    .metadata  __0_0_0.distcp  __1_0_0.distcp ...   tensors, in the format of torch.distributed.checkpoint
    state.json            step, tokens, optimizer, whether it is good, known past of carried states, data fingerprint, config, versions
    manifest.json         size and hash of every file above
  step-00002000.tmp/      being written, or left by a run that was killed
  step-00001000.old/      replaced by a new checkpoint of the same step; used only if that one is damaged
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from based_megatron.checkpoint.manifest import MANIFEST, STATE, listed, problems, read_manifest
from based_megatron.checkpoint.metadata import read_metadata
from based_megatron.checkpoint.ranks import Ranks, all_ranks
from based_megatron.errors import CheckpointError
from based_megatron.run_folder.files import CHECKPOINTS as FOLDER
from based_megatron.run_folder.files import ROLLED_BACK

GOOD = "good"
"""Entry of a checkpoint's state: false if steps before it were skipped or suspect, so that its weights may have diverged."""
_NAMED = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when a new one is there. The new one and the newest good one always do."""

    last: int = 0
    """Newest ones; 0 keeps all."""
    every_steps: int = 0
    """The first checkpoint of every so many steps stays for good; 0 keeps none for that."""
    proven_after_steps: int = 0
    """A checkpoint is surely good so many steps later: the newest that is stays, and the one that will be next."""


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Step of a checkpoint folder."""
    match = _NAMED.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name must be like {step_name(1000)}")
    return int(match[1])


def named_checkpoints(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, complete or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAMED.fullmatch(path.name)]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder by name, newest first; their files are not looked at."""
    return [path for path in named_checkpoints(folder) if (path / MANIFEST).is_file()]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint by name, or None."""
    return next(iter(list_checkpoints(folder)), None)


def newest_good(folder: Path, before_step: int | None = None) -> Path | None:
    """The newest complete checkpoint that was saved while no step was skipped or suspect, or None; its files are not verified.

    before_step: look at those of earlier steps only. Checkpoints that do not say whether they are good are.
    """
    for path in list_checkpoints(folder):
        if (before_step is None or step_of(path) < before_step) and _is_good(path):
            return path
    return None


def verify(path: Path, ranks: Ranks | None = None) -> list[str]:
    """Faults of a checkpoint's files, none if it is whole; the ranks share the hashing (collective).

    Each file is read by one rank, the manifest too.
    """
    ranks = ranks or all_ranks()
    entries, unreadable = ranks.on_first(lambda: listed(path))
    if unreadable:
        return unreadable
    shares = ranks.together(lambda: problems(path, entries[ranks.rank :: ranks.size]))
    wrong = list(dict.fromkeys(problem for share in shares for problem in share))
    return wrong or ranks.on_first(lambda: _contradictions(path))


def newest_valid(
    folder: Path, on_skip: Callable[[str], None], ranks: Ranks | None = None, latest_step: int | None = None
) -> Path | None:
    """The newest checkpoint whose files are as written, or None if there is no checkpoint at all (collective).

    latest_step: leave those of later steps out.

    Every newer one that is skipped is reported to `on_skip` on rank 0, one line each: damaged ones, and what holds a
    checkpoint under another name. Raises CheckpointError if there are only such: whether to start over in their place is for
    the user to decide.
    """
    ranks = ranks or all_ranks()
    candidates = ranks.on_first(lambda: named_checkpoints(folder))
    others = ranks.on_first(lambda: _under_other_names(folder))
    if latest_step is not None:
        candidates, others = [path for path in candidates if step_of(path) <= latest_step], []
    tell = on_skip if ranks.rank == 0 else lambda line: None
    for number, path in enumerate(candidates):
        wrong = verify(path, ranks)
        if not wrong:
            for other, step in others:
                if other not in candidates[:number] and (step is None or step > step_of(path)):
                    tell(f"{other} was skipped: {_renamed(step)}")
            return path
        if ranks.on_first(functools.partial(is_gone, path)):
            # A run that goes on has deleted it, after it had saved a newer one.
            return newest_valid(folder, on_skip, ranks, latest_step)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        tell(f"checkpoint {path} is damaged and was skipped: {wrong[0]}{more}")
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged: restore one, or choose another --run-dir"
        )
    if others:
        other, step = others[-1]
        raise CheckpointError(f"there is no checkpoint in {folder} but {other.name}: {_renamed(step)}")
    return None


def resolve_checkpoint(path: Path, on_skip: Callable[[str], None], ranks: Ranks | None = None) -> Path:
    """The checkpoint that a path names: itself, or the newest valid one of a run or checkpoints folder (collective).

    Raises CheckpointError if there is none, or if the checkpoint named is damaged.
    """
    ranks = ranks or all_ranks()
    if ranks.on_first(lambda: (path / MANIFEST).is_file()):
        if wrong := verify(path, ranks):
            if ranks.on_first(lambda: is_gone(path)):
                raise deleted(path)
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


def prune(folder: Path, kept: Kept, saved: Path) -> list[Path]:
    """Delete what a new checkpoint `saved` makes superfluous, on one rank; returns the checkpoints deleted.

    `saved` stays, what `kept` says, the newest good one, and later steps, which only an earlier run that went further can have
    left. Remains of unfinished saves go. Raises CheckpointError if a deletion fails.
    """
    doomed = _superfluous(folder, kept, saved)
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


def _superfluous(folder: Path, kept: Kept, saved: Path) -> list[Path]:
    upto = [path for path in list_checkpoints(folder) if step_of(path) <= step_of(saved)]
    before = [path for path in upto if step_of(path) < step_of(saved)]
    if not kept.last:
        return []
    good = [path for path in upto if _is_good(path)]
    proven = [path for path in good if step_of(path) <= step_of(saved) - kept.proven_after_steps]
    stays = {*good[:1], *proven[:1]}
    if kept.proven_after_steps and len(good) > len(proven):
        stays.add(good[-1 - len(proven)])  # the oldest that is not proven: the next one to be
    if kept.every_steps:
        # Newest first: the last one to be entered is the first of its interval.
        firsts = {step_of(path) // kept.every_steps: path for path in upto}
        stays |= {path for number, path in firsts.items() if number}
    return [path for path in before[kept.last - 1 :] if path not in stays]


def _is_good(path: Path) -> bool:
    state = _state(path)
    return bool(state) and bool(state.get(GOOD, True))


def deleted(path: Path) -> CheckpointError:
    """The error of a checkpoint that its run has deleted under a reader."""
    return CheckpointError(
        f"checkpoint {path} was deleted while it was read: give its run folder, or let the run keep more (checkpoint.keep_last)"
    )


def is_gone(path: Path) -> bool:
    """Whether nothing has this name, not even a link that leads nowhere."""
    return not os.path.lexists(path)


def _under_other_names(folder: Path) -> list[tuple[Path, int | None]]:
    """What holds a checkpoint of another step than its name says, with that step (None if unreadable). Unfinished saves do
    not count, nor what one that has replaced it was deleting."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        replaced = path.suffix == ".old" and path.with_suffix("").is_dir()
        if path.suffix != ".tmp" and not replaced and (path / MANIFEST).is_file():
            named, step = _NAMED.fullmatch(path.name), _state(path).get("step")
            if named is None or int(named[1]) != step:
                found.append((path, step if isinstance(step, int) else None))
    return found


def _renamed(step: int | None) -> str:
    return (
        "it holds a checkpoint"
        if step is None
        else f"it holds the checkpoint of step {step}, whose name is {step_name(step)}"
    )


def _contradictions(path: Path) -> list[str]:
    """What the files of a checkpoint, each as written, say against each other or its name."""
    named, saved = _NAMED.fullmatch(path.name), _state(path).get("step")
    if named and int(named[1]) != saved:
        return [f"it is named for step {int(named[1])} but {STATE} is of step {saved}"]
    entries = {entry.name for entry in read_manifest(path)}
    try:
        stored = {info.relative_path for info in read_metadata(path).storage_data.values()}
    except CheckpointError as error:
        return [str(error)]
    return [f"{name} is not listed in {MANIFEST}" for name in sorted(stored - entries)]


def _state(path: Path) -> dict[str, Any]:
    """What state.json says, empty if it cannot be read."""
    try:
        found = json.loads((path / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
