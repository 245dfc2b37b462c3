"""A checkpoint's table of tensors and where their bytes lie, `.metadata`: torch.distributed.checkpoint pickles it.

A pickle can name any function to call. Whoever reads a checkpoint of someone else reads it here, where only what makes up such a
table is known.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from based_megatron.checkpoint.manifest import METADATA
from based_megatron.errors import CheckpointError

PARTS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}
"""What a table may name, by module; dtypes of torch besides."""


class _TableReader(pickle.Unpickler):
    """Makes nothing but the parts of such a table."""

    def find_class(self, module: str, name: str) -> Any:
        if name in PARTS.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a table of tensors")


def read_metadata(path: Path) -> Metadata:
    """The table of the checkpoint `path`. Raises CheckpointError if it cannot be read, or is something else."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            found = _TableReader(stream).load()
    # Damaged bytes are read as other instructions, which can fail of anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}): see `based ckpt verify`") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not a table of tensors: see `based ckpt verify`")
    return found
