"""Writing a checkpoint: all or nothing, and every rank knows which."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.manifest import (
    METADATA,
    STATE,
    FileEntry,
    seal_file,
    write_durably,
    write_manifest,
)
from based_megatron.checkpoint.ranks import Ranks, all_ranks, without_dcp_warning
from based_megatron.checkpoint.rectangles import FragmentSavePlanner
from based_megatron.checkpoint.store import step_name
from based_megatron.checkpoint.writer import PartWriter, files_of_rank
from based_megatron.errors import CheckpointError
from based_megatron.run_folder.history import versions
from based_megatron.run_folder.whole_file import sync_folder

FORMAT = 1


def save_checkpoint(
    folder: Path,
    step: int,
    fragments: Sequence[Fragment],
    state: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> Path:
    """Write `folder`/step-XXXXXXXX from the fragments of all ranks (collective); returns it.

    `state` is JSON: what the caller needs to go on (tokens_seen, optimizer, config, ...); rank 0's is written. The
    tensors are read before this returns. `folder` must be the same on all ranks.

    Raises CheckpointError on every rank if any of them fails (full disk, quota, ...): earlier checkpoints are then
    untouched, and so are the tensors, so that training may go on.
    """
    ranks = ranks or all_ranks()
    final = folder / step_name(step)
    unfinished = final.with_name(final.name + ".tmp")
    try:
        ranks.on_first(lambda: _make_empty(unfinished))
        _write_tensors(unfinished, fragments, ranks)
        sealed = ranks.together(lambda: [seal_file(path) for path in files_of_rank(unfinished, ranks.rank)])
        kinds = sorted({kind for fragment in fragments for kind in fragment.tensors})
        document = {
            "format": FORMAT,
            "step": step,
            "kinds": kinds,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            **state,
        }
        ranks.on_first(lambda: _commit(unfinished, final, [entry for share in sealed for entry in share], document))
    except CheckpointError as error:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # what is left is removed by the next save or prune
        raise CheckpointError(
            f"step {step} was not saved to {folder}, earlier checkpoints are untouched: {error}"
        ) from None
    return final


def _make_empty(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _write_tensors(path: Path, fragments: Sequence[Fragment], ranks: Ranks) -> None:
    try:
        with without_dcp_warning(ranks):
            dcp.save(
                {},
                storage_writer=PartWriter(path),
                planner=FragmentSavePlanner(fragments),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.CheckpointException as error:
        raise CheckpointError(ranks.first_failure(error)) from error


def _commit(unfinished: Path, final: Path, sealed: list[FileEntry], document: dict[str, Any]) -> None:
    """Describe the files, make everything durable, and only then give the folder its name."""
    for entry in sealed:
        path = unfinished / entry.name
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            raise CheckpointError(
                f"rank 0 does not see {path} as written: --run-dir must be on a disk shared by all nodes"
            )
    write_durably(unfinished / STATE, json.dumps(document, indent=1))
    write_manifest(unfinished, [*sealed, seal_file(unfinished / METADATA), seal_file(unfinished / STATE)])
    sync_folder(unfinished)
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(unfinished, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
