"""Who a run is: the folder that belongs to it alone, the settings that it keeps, and the record of each start."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import based_megatron
from based_megatron.checkpoint.load import MODEL, read_state
from based_megatron.checkpoint.manifest import is_as_written
from based_megatron.checkpoint.ranks import Ranks
from based_megatron.checkpoint.store import FOLDER, STATE, list_checkpoints, newest_valid, step_of
from based_megatron.config import Config, save_config, to_dict
from based_megatron.config.changes import changed_settings, describe_changes, is_allowed, refused_changes
from based_megatron.config.load import with_former_settings
from based_megatron.data.fingerprints import corpora_before
from based_megatron.data.jumps import DataJumps
from based_megatron.errors import CheckpointError, ConfigError
from based_megatron.run_folder.files import CONFIG, DONE, EVENTS
from based_megatron.run_folder.history import Start, append_start, git_commit, new_run_id, read_history, versions
from based_megatron.run_folder.json_lines import read_lines
from based_megatron.run_folder.lock import FORMER_JOB, RunLock, this_process
from based_megatron.train.guard import GUARD, skips_at_end


@dataclass(frozen=True)
class Identity:
    """A run as one of its starts finds it."""

    run_id: str
    run_name: str
    start: int
    """Number of this start, from 1."""
    saved_step: int
    """Step of the newest checkpoint; 0 without one."""
    changes: dict[str, list[Any]]
    """Settings that differ from those of the checkpoint, or without one from those of the last start: [then, now]."""


def identify(config: Config, data_fingerprint: str) -> Identity:
    """The run that lives in the run folder, or a new one. Looks at names and small files only, and writes nothing.

    Raises ConfigError for a start that would not go on with this run as it is.
    """
    run_dir = Path(config.run_dir)
    history, checkpoints = read_history(run_dir), list_checkpoints(run_dir / FOLDER)
    last = history[-1] if history else None
    if not checkpoints:
        _check_nothing_was_saved(run_dir, history)
    elif not config.checkpoint.resume:
        raise ConfigError(
            f"{run_dir} has a checkpoint of step {step_of(checkpoints[0])}, from which a later start would go on: with "
            f"checkpoint.resume=false give the new run a run_dir of its own"
        )
    newest = _newest_state(checkpoints)
    run_id = last.run_id if last else None
    changes: dict[str, list[Any]] = {}
    if newest:
        path, state = newest
        run_id = _one_run_id(path, state.get("run_id"), run_id)
        changes = check_changes(config, data_fingerprint, path, state)
    elif last:
        changes = changed_settings(Config, with_former_settings(last.config), to_dict(config))
        if refused_changes(Config, changes, allowed=()):
            run_id = None  # nothing of the old run is left to go on with
    return Identity(
        run_id=run_id or new_run_id(),
        run_name=config.run_name or run_dir.resolve().name,
        start=last.start + 1 if last else 1,
        saved_step=step_of(checkpoints[0]) if checkpoints else 0,
        changes=changes,
    )


def check_changes(config: Config, data_fingerprint: str, path: Path, state: dict[str, Any]) -> dict[str, list[Any]]:
    """The settings that differ from those of a checkpoint: [then, now].

    Raises ConfigError for those that are part of what the run is, unless `checkpoint.allow_changed` names them.
    """
    if state["kinds"] == [MODEL]:
        return {}  # imported weights, which have not been trained by these settings
    allowed = config.checkpoint.allow_changed
    changes = changed_settings(Config, with_former_settings(state["config"]), to_dict(config))
    refused = refused_changes(Config, changes, allowed)
    key = "data.sources" if config.data.sources else "data.path"
    then, now = _corpora_read(state, data_fingerprint)
    words = [describe_changes(refused)] if refused else []
    if then != now and not is_allowed(key, allowed):
        words.append(f"the content of {key} (fingerprint {then} -> {now}{_advice(config, state)})")
        refused[key] = [then, now]
    if refused:
        raise ConfigError(
            f"{path} is of a run with other settings: {', '.join(words)}. Give the new run a run_dir of its own, restore the settings, or "
            f"allow this run to change with --checkpoint.allow-changed {' '.join(refused)}"
        )
    return changes


@contextmanager
def locked_folder(config: Config, ranks: Ranks) -> Iterator[RunLock]:
    """The run folder for these ranks alone; rank 0 holds the lock (collective). Raises ConfigError if another job has it."""
    run_dir = Path(config.run_dir)
    lock = RunLock(run_dir, this_process(config.train.lock_seconds), _tell, os.environ.get(FORMER_JOB))
    ranks.on_first(lambda: run_dir.mkdir(parents=True, exist_ok=True))
    try:
        # In turns of a second, so that ranks that wait for rank 0 do not run into the timeout of a collective.
        while not ranks.on_first(lock.try_take):
            pass
        yield lock
    finally:
        if ranks.rank == 0:
            lock.release()


def is_done(config: Config, identity: Identity, ranks: Ranks) -> bool:
    """Whether the last checkpoint is there, and whole, and of a step that was not skipped: nothing is left to train (collective)."""
    if identity.saved_step < config.train.steps:
        return False
    newest = newest_valid(Path(config.run_dir) / FOLDER, lambda _: None, ranks)
    if newest is None or step_of(newest) < config.train.steps:
        return False
    return not ranks.on_first(lambda: skips_at_end(read_state(newest)))


def record_start(config: Config, identity: Identity, from_step: int, ranks: Ranks, hosts: Sequence[str]) -> None:
    """Write config.yaml and an entry of the history, now that nothing speaks against this start (collective). hosts: of each rank."""
    start = Start(
        start=identity.start,
        run_id=identity.run_id,
        run_name=identity.run_name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        config=to_dict(config),
        changes=identity.changes,
        git_commit=None,
        versions=versions(),
        hosts=list(dict.fromkeys(hosts)),
        ranks=ranks.size,
        job=os.environ.get("SLURM_JOB_ID"),
        from_step=from_step,
    )
    ranks.on_first(lambda: _write_start(config, start))


def _write_start(config: Config, start: Start) -> None:
    run_dir = Path(config.run_dir)
    commit = git_commit(Path(based_megatron.__file__).parent)
    save_config(config, run_dir / CONFIG)
    (run_dir / DONE).unlink(missing_ok=True)
    append_start(run_dir, dataclasses.replace(start, git_commit=commit))


def _check_nothing_was_saved(run_dir: Path, history: list[Start]) -> None:
    """Checkpoints that were there and are not must not make a run begin anew without a word."""
    folder = run_dir / FOLDER
    steps = [start.from_step for start in history]
    if (run_dir / EVENTS).exists():
        steps += [line.get("step", 0) for line in read_lines(run_dir / EVENTS) if line.get("event") == "checkpoint"]
    if folder.is_dir():
        steps += [step for path in folder.iterdir() if (step := _step_or_0(path))]
    step = max(steps, default=0)
    if step or (run_dir / DONE).exists():
        raise ConfigError(
            f"{run_dir} has saved step {step or '?'}, but there is no whole checkpoint in {folder}: put the checkpoints back, or give "
            f"the new run a run_dir of its own"
        )


def _step_or_0(path: Path) -> int:
    try:
        return step_of(path)
    except CheckpointError:
        return 0


def _newest_state(checkpoints: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose state is as written. Whether its tensors are shows when they are loaded."""
    for path in checkpoints:
        if is_as_written(path, STATE):
            return path, read_state(path)
    return None


def _one_run_id(path: Path, of_checkpoint: str | None, of_folder: str | None) -> str | None:
    if of_checkpoint and of_folder and of_checkpoint != of_folder:
        raise ConfigError(
            f"{path} is of run {of_checkpoint}, but its folder belongs to run {of_folder}: take it away, or start from its weights with "
            f"checkpoint.load and a run_dir of its own"
        )
    return of_checkpoint or of_folder


def _corpora_read(state: dict[str, Any], data_fingerprint: str) -> tuple[str, str]:
    """What the run has read up to a checkpoint, as its fingerprint says and as the present one does; what comes later may change."""
    data, sequences = state["config"]["data"], _sequences_read(state)
    weights = [source["weight"] for source in data.get("sources", ())]
    return corpora_before(state["data_fingerprint"], sequences, weights), corpora_before(data_fingerprint, sequences)


def _sequences_read(state: dict[str, Any]) -> int:
    """Sequences of the order of the data before the step that follows a checkpoint."""
    jumps = DataJumps.read(state.get(GUARD, {}).get("data_jumps", ()))
    return jumps.data_step(state["step"]) * state["config"]["train"]["global_batch_sequences"]


def _advice(config: Config, state: dict[str, Any]) -> str:
    """How the weights of a mixture can change, if it is these that differ."""
    data = state["config"]["data"]
    then = [source["weight"] for source in data.get("sources", ())]
    now = [source.weight for source in config.data.sources]
    if then == now or len(then) != len(now) or config.data.schedule:
        return ""
    tokens = _sequences_read(state) * data["sequence_length_tokens"]
    return (
        f"; weights may change from here on: leave those of data.sources at {','.join(map(str, then))}, and add "
        f"--data.schedule {tokens}={','.join(map(str, now))}"
    )


def _tell(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", flush=True)
