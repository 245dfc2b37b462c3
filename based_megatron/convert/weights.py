"""Weights of a Hugging Face folder: of the one file, or of those that its index names, and of no other file that lies there."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from based_megatron.errors import CheckpointError

SAFE_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
INDEX = ".index.json"
"""What follows the name of the one file in that of an index."""


def read_safetensors(folder: Path) -> dict[str, Tensor] | None:
    """Tensors of model.safetensors or of the files of its index; None if neither is there. Raises CheckpointError."""
    return _read(folder, SAFE_NAME, load_file)


def read_pickled(folder: Path) -> dict[str, Any] | None:
    """Entries of pytorch_model.bin or of the files of its index, read without running code; None if neither is there.

    Raises CheckpointError, also for a part of a file that is not what was written, by the file's own checksums.
    """
    return _read(folder, PICKLE_NAME, _load_pickled)


def _read(folder: Path, name: str, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    index = folder / f"{name}{INDEX}"
    if (folder / name).is_file():
        return _checked(folder / name, load)
    if not index.is_file():
        return None
    places = _places(index)
    weights: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        found = _checked(folder / file, load)
        strays = sorted(key for key in found if places.get(key) != file)
        missing = sorted(key for key, place in places.items() if place == file and key not in found)
        if strays or missing:
            what = f"has {strays[0]}, which" if strays else f"lacks {missing[0]}, which"
            raise CheckpointError(f"{folder / file} {what} {index.name} places elsewhere: copy the whole folder again")
        weights |= found
    return weights


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index}: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of its folder")
    return places


def _checked(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        weights = load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and was not loaded ({' '.join(str(error).split())[:200]}); "
            f"get the weights as {SAFE_NAME}, from a source that you trust"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; copy it again") from error
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"{path} holds a {type(weights).__name__}, not a table of tensors; give a released checkpoint"
        )
    return weights


def _load_pickled(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)
