"""Conversion between the partitions of a ZeRO engine on this rank and the fragments of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import MODEL

if TYPE_CHECKING:  # `based ckpt` needs no Megatron-core
    from based_megatron.parallel.deepspeed import ZeroEngine


def zero_fragments(engine: ZeroEngine) -> list[Fragment]:
    """Views of this rank's master weights and optimizer state, for saving and for loading in place.

    State that does not exist yet (before the first step) is created as zeros.
    """
    fragments = []
    for partition in engine.optimizer.partitions:
        flat = {MODEL: partition.master.detach(), **engine.optimizer.state(partition.master)}
        for piece in partition.pieces:
            tensors = {kind: piece.of(tensor) for kind, tensor in flat.items()}
            fragments.append(Fragment(piece.spec, piece.start, piece.numel, tensors, piece.owned))
    return fragments


def optimizer_entry(engine: ZeroEngine) -> dict[str, Any]:
    """The entry `optimizer` of a checkpoint's state: its name, and what is one number for all elements."""
    return {"name": engine.optimizer.name, **engine.optimizer.scalars()}


def saved_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entry `optimizer` of a saved state. Checkpoints without one are of AdamW, whose step count has an entry of its own."""
    return state["optimizer"] if "optimizer" in state else {"name": "adamw", "step": state["adam_step"]}


def after_load(engine: ZeroEngine, optimizer: Mapping[str, Any] | None) -> None:
    """Make a loaded engine ready for the next step, on every rank (collective).

    optimizer: the entry that was saved; None after a load of weights alone, for an optimizer as new.
    """
    scalars = engine.optimizer.scalars()
    engine.optimizer.load_scalars(dict.fromkeys(scalars, 0) if optimizer is None else optimizer)
    engine.masters_to_weights()
