"""One checkpoint of a run, whatever the layout that wrote it and the layout that reads it."""

from based_megatron.checkpoint.carried import carried_fragments
from based_megatron.checkpoint.fragments import Fragment, Rectangle, rectangles
from based_megatron.checkpoint.full import read_full, write_full
from based_megatron.checkpoint.load import load_carried, load_checkpoint, read_state
from based_megatron.checkpoint.ranks import ALONE, Ranks, all_ranks
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import find_checkpoint, newest_valid, prune, resolve_checkpoint, verify
from based_megatron.checkpoint.zero import after_load, optimizer_entry, saved_optimizer, zero_fragments

__all__ = [
    "ALONE",
    "Fragment",
    "Ranks",
    "Rectangle",
    "after_load",
    "all_ranks",
    "carried_fragments",
    "find_checkpoint",
    "load_carried",
    "load_checkpoint",
    "newest_valid",
    "optimizer_entry",
    "prune",
    "read_full",
    "read_state",
    "rectangles",
    "resolve_checkpoint",
    "save_checkpoint",
    "saved_optimizer",
    "verify",
    "write_full",
    "zero_fragments",
]
