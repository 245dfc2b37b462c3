"""Reading a checkpoint into live tensors, however it was sharded when written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from based_megatron.checkpoint.carried import CARRIED
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.manifest import STATE
from based_megatron.checkpoint.metadata import read_metadata
from based_megatron.checkpoint.ranks import Ranks, all_ranks, without_dcp_warning
from based_megatron.checkpoint.reader import RangeReader
from based_megatron.checkpoint.rectangles import FragmentLoadPlanner, stored_name
from based_megatron.checkpoint.save import FORMAT
from based_megatron.errors import CheckpointError

MODEL = "model"


def load_checkpoint(
    path: Path,
    fragments: Sequence[Fragment],
    weights_only: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Fill the fragments of all ranks from the checkpoint `path` (collective); returns the state it was saved with.

    Tensor parallel padding becomes zero. With weights_only the optimizer's tensors become zero too, and the checkpoint needs none.
    The checkpoint is taken as whole: find it with newest_valid or resolve_checkpoint.

    Raises CheckpointError on every rank, before anything is changed, if names or shapes differ from the checkpoint's.
    """
    ranks = ranks or all_ranks()
    kinds = [MODEL] if weights_only else sorted({kind for fragment in fragments for kind in fragment.tensors})
    try:
        stored = ranks.on_first(lambda: _Stored(read_state(path), read_metadata(path)))
        wanted = set().union(*ranks.together(lambda: _check_fragments(stored, fragments, kinds)))
        _check_nothing_left(stored, wanted)
        for fragment in fragments:
            for tensor in fragment.tensors.values():
                tensor.zero_()
        _read_tensors(path, stored.metadata, fragments, kinds, ranks)
        return stored.state
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {path}: {error}") from None


def load_carried(path: Path, fragments: Sequence[Fragment], ranks: Ranks | None = None) -> None:
    """Fill the fragments of all ranks with the carried states of the checkpoint `path` (collective).

    Raises CheckpointError on every rank, before anything is changed, if it has none of them or in other shapes.
    """
    ranks = ranks or all_ranks()
    metadata = ranks.on_first(lambda: read_metadata(path))
    ranks.together(lambda: _check_carried(path, metadata, fragments))
    _read_tensors(path, metadata, fragments, [CARRIED], ranks)


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; raises CheckpointError if it is unreadable or of an unknown format."""
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE} is unreadable ({error}): see `based ckpt verify`") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} holds a {type(state).__name__}: see `based ckpt verify`")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors by name (KIND.NAME, of the kinds model, carried and those of the optimizer)."""
    return _shapes(read_metadata(path))


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint says of itself.

    One rank reads it and sends it to the others: it grows with the ranks that saved it, so all of them would read its square.
    """

    state: dict[str, Any]
    metadata: Metadata


def _shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    entries = metadata.state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _check_fragments(stored: _Stored, fragments: Sequence[Fragment], kinds: Sequence[str]) -> set[str]:
    """Names of the parameters, if the checkpoint has them all in their shapes."""
    has = stored.state["kinds"]
    if has == [MODEL] and (missing := [kind for kind in kinds if kind != MODEL]):
        raise CheckpointError(f"it has no {' and '.join(missing)}, only weights: start from it with --checkpoint.load")
    shapes = _shapes(stored.metadata)
    for fragment in fragments:
        name, shape = fragment.spec.name, fragment.spec.shape
        found = shapes.get(stored_name(MODEL, name))
        if found is None:
            raise CheckpointError(f"it has no parameter {name}, which is {shape} in this model: check --model settings")
        if found != shape:
            raise CheckpointError(f"{name} is {found} there and {shape} in this model: check --model settings")
        for kind in fragment.tensors.keys() & set(kinds):
            if stored_name(kind, name) not in shapes:
                raise CheckpointError(
                    f"it has no {kind} of {name}, only {', '.join(has)}: set optimizer.name to the one that it was trained with, "
                    f"or start a new run_dir from its weights with checkpoint.load"
                )
    return {fragment.spec.name for fragment in fragments}


def _check_nothing_left(stored: _Stored, wanted: set[str]) -> None:
    for name, shape in _shapes(stored.metadata).items():
        kind, _, parameter = name.partition(".")
        if kind == MODEL and parameter not in wanted:
            raise CheckpointError(
                f"it has a parameter {parameter} of {shape}, not in this model: check --model settings"
            )


def _check_carried(path: Path, metadata: Metadata, fragments: Sequence[Fragment]) -> None:
    shapes = _shapes(metadata)
    for fragment in fragments:
        name, shape = stored_name(CARRIED, fragment.spec.name), fragment.spec.shape
        found = shapes.get(name, "missing")
        if found != shape:
            raise CheckpointError(f"cannot load {path}: {name} is {found} there and {shape} in this run")


def _read_tensors(
    path: Path, metadata: Metadata, fragments: Sequence[Fragment], kinds: Sequence[str], ranks: Ranks
) -> None:
    try:
        with without_dcp_warning(ranks):
            dcp.load(
                {},
                storage_reader=RangeReader(path, metadata),
                planner=FragmentLoadPlanner(fragments, kinds),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.CheckpointException as error:
        raise CheckpointError(ranks.first_failure(error)) from error
