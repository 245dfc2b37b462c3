"""Renaming between our tensors and those of another layout, as one table that is read in both directions.

Our names and shapes are those of the unsharded state dict that a checkpoint stores. Fused projections are stacks of
rows, so that every conversion is a split, a concatenation and a reshape: bit-exact.
Legend: D hidden size, F width of the MLP, U rows of the embedding.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from based_megatron.config.limits import check_limits
from based_megatron.config.schema import ModelConfig
from based_megatron.errors import CheckpointError, ConfigError
from based_megatron.model.mixers import layer_mixers
from based_megatron.model.mixers.facts import Shape

SHORTEST_REPEAT = 6


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the tensors of the other layout whose rows, stacked, make it."""

    name: str
    shape: Shape
    parts: tuple[tuple[str, Shape], ...]


def our_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the unsharded state dict."""
    D, F = config.hidden_size, config.ffn_hidden_size
    U = config.embedding_rows
    shapes: dict[str, Shape] = {"embedding.weight": (U, D), "final_norm.weight": (D,)}
    if not config.tie_embeddings:
        shapes["output.weight"] = (U, D)
    for i, mixer in enumerate(layer_mixers(config)):
        layer = f"layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (D,) for norm in ("mixer_norm", "mlp_norm")}
        shapes |= {f"{layer}.mlp.fc1.weight": (2 * F, D), f"{layer}.mlp.fc2.weight": (D, F)}
        shapes |= {f"{layer}.mixer.{name}": shape for name, shape in mixer.parameter_shapes(config).items()}
    return shapes


def check_read(config: ModelConfig) -> ModelConfig:
    """The config that a foreign file gave, if every value has its type and is within the limits of `model.*`.

    Raises CheckpointError.
    """
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), type(field.default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise CheckpointError(f"config.json gives {value!r} for model.{field.name}, which is no {wanted.__name__}")
    try:
        check_limits(config, lambda key: f"model.{key}")
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error
    if config.hidden_size % config.num_heads:
        raise CheckpointError(
            f"config.json gives {config.num_heads} heads for a hidden size of {config.hidden_size}: no multiple"
        )
    return config


def check_finite(weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError if weights hold NaN or infinity: no text and no proof can come of them."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            wrong = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{name} of {source} has {wrong:,} of {tensor.numel():,} values that are nan or infinite: take an earlier checkpoint"
            )


def to_other(state_dict: dict[str, Tensor], table: list[Entry]) -> dict[str, Tensor]:
    """Our tensors in the other layout; those that are only renamed share their memory.

    Raises CheckpointError for missing, unexpected or misshapen tensors.
    """
    check_shapes(state_dict, {entry.name: entry.shape for entry in table})
    other: dict[str, Tensor] = {}
    for entry in table:
        pieces = state_dict[entry.name].split([shape[0] for _, shape in entry.parts])
        for (name, shape), piece in zip(entry.parts, pieces, strict=True):
            other[name] = piece.reshape(shape) if len(pieces) == 1 else piece.reshape(shape).clone()
    return other


def to_ours(other: dict[str, Tensor], table: list[Entry]) -> dict[str, Tensor]:
    """The inverse of to_other, with the same errors."""
    check_shapes(other, {name: shape for entry in table for name, shape in entry.parts})
    ours: dict[str, Tensor] = {}
    for entry in table:
        pieces = [other[name] for name, _ in entry.parts]
        ours[entry.name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(entry.shape)
    return ours


def check_shapes(state_dict: dict[str, Tensor], expected: dict[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors are exactly the expected ones."""
    missing, unexpected = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"weights do not fit the config: {len(missing)} tensors missing{_some(missing)}, "
            f"{len(unexpected)} unexpected{_some(unexpected)}; check the layer pattern in the config"
        )
    for name, shape in expected.items():
        if tuple(state_dict[name].shape) != shape:
            raise CheckpointError(
                f"weights do not fit the config: {name} is {list(state_dict[name].shape)}, expected {list(shape)}"
            )


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model, without building it."""
    return sum(prod(shape) for shape in our_shapes(config).values())


def short_pattern(letters: str) -> str:
    """A layer pattern for one letter per layer, long repeats written once: `cLScccLSccc` -> `cLScc*2 c`."""
    groups, start = [""], 0
    while start < len(letters):
        sizes = range(1, len(letters) - start + 1)
        covered, size = max(((_covered(letters[start:], size), size) for size in sizes), key=lambda x: (x[0], -x[1]))
        if covered >= SHORTEST_REPEAT:
            groups += [f"{letters[start : start + size]}*{covered // size}", ""]
            start += covered
        else:
            groups[-1] += letters[start]
            start += 1
    return " ".join(group for group in groups if group)


def _covered(letters: str, size: int) -> int:
    """Letters at the start that repeat the first `size` of them; 0 if they come once only."""
    count = 1
    while letters.startswith(letters[:size], size * count):
        count += 1
    return size * count if count > 1 else 0


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return f" ({', '.join(names[:most])}{', ...' if len(names) > most else ''})" if names else ""
