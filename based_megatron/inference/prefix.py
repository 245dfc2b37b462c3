"""Starts of prompts that have been read before: their states are of constant size, and are copied in place of a reading.

Legend: B rows, U vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from based_megatron.errors import CheckpointError
from based_megatron.inference.reader import Reader, Tokens
from based_megatron.model.states import ModelStates

MODEL, TOKENS, LOGITS, STATE = "model", "tokens", "logits", "state."


@dataclass(frozen=True)
class Prefix:
    """The start of prompts, read."""

    tokens: Tokens
    logits_1U: Tensor
    """Logits of the token after it."""
    states: ModelStates
    """States of one sequence."""

    def save(self, path: Path, model: nn.Module) -> None:
        """Write a file that `load_prefix` reads. Raises CheckpointError if it cannot be written."""
        tensors = {STATE + name: x.cpu().contiguous() for name, x in self.states.tensors().items()}
        tensors |= {TOKENS: torch.tensor(self.tokens), LOGITS: self.logits_1U.cpu().contiguous()}
        try:
            save_file(tensors, path, metadata={MODEL: fingerprint(model)})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write the states to {path}: {error}; choose another --save-prefix"
            ) from error


def load_prefix(path: Path, model: nn.Module, empty: ModelStates) -> Prefix:
    """The prefix that a file holds; `empty`, states of one sequence, is filled and becomes its states.

    Raises CheckpointError for a file that cannot be read, and for one of another model: other weights or another precision.
    """
    try:
        with safe_open(path, "pt") as file:
            made_by = (file.metadata() or {}).get(MODEL)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the states in {path}: {error}; give another --prefix") from error
    device = empty.position_B.device
    buffers = empty.tensors()
    fits = made_by == fingerprint(model) and tensors.keys() == {TOKENS, LOGITS, *(STATE + name for name in buffers)}
    if not fits:
        raise CheckpointError(
            f"the states in {path} are not of this model's weights in this precision: give the model and the --precision that wrote them, "
            f"or write them again with --save-prefix"
        )
    for name, x in buffers.items():
        x.copy_(tensors[STATE + name])
    empty.is_start = False
    return Prefix(tuple(tensors[TOKENS].tolist()), tensors[LOGITS].to(device), empty)


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights of a model, as they are on its device."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PrefixStore:
    """Prefixes that rows are begun from, where they start with one: those that were added, and prompts that were read last."""

    def __init__(self, remembered: int = 0) -> None:
        """remembered: prompts whose states are kept when they have been read."""
        self.remembered, self._recent = remembered, dict[Tokens, Prefix]()
        self._added: list[Prefix] = []
        self.saved_tokens = 0
        """Tokens of prompts that were not read again."""

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix for good."""
        self._added.append(prefix)

    def read(self, reader: Reader, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
        """Logits [B, U] of the last token of each row, and its states."""
        prefixes = [self._longest(row, reader.prefix_tokens) for row in rows]
        if not any(prefixes):
            logits_BU, states = _read_new(reader, rows)
        else:
            logits_BU, states = self._read_on(reader, rows, prefixes)
        self._remember(reader, rows, logits_BU, states)
        return logits_BU, states

    def _longest(self, row: Tokens, least: int) -> Prefix | None:
        fits = [
            prefix
            for prefix in (*self._added, *self._recent.values())
            if row[: len(prefix.tokens)] == prefix.tokens and (len(prefix.tokens) >= least or row == prefix.tokens)
        ]
        return max(fits, key=lambda prefix: len(prefix.tokens), default=None)

    def _read_on(
        self, reader: Reader, rows: Sequence[Tokens], prefixes: Sequence[Prefix | None]
    ) -> tuple[Tensor, ModelStates]:
        """Rows of which some start with a prefix: those of each are read together."""
        states = reader.engine.model.zero_states(len(rows))
        parts: dict[tuple[int, bool], list[int]] = {}
        for place, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
            is_all = prefix is not None and len(prefix.tokens) == len(row)
            parts.setdefault((id(prefix), is_all), []).append(place)
        found: dict[int, Tensor] = {}
        for places in parts.values():
            prefix, group = prefixes[places[0]], [rows[place] for place in places]
            if prefix is None:
                logits_BU, read = _read_new(reader, group)
            else:
                self.saved_tokens += len(prefix.tokens) * len(group)
                read = prefix.states.take(reader.index([0] * len(group)))
                logits_BU = prefix.logits_1U.expand(len(group), -1)
                if len(group[0]) > len(prefix.tokens):
                    logits_BU, read = reader.read([row[len(prefix.tokens) :] for row in group], read)
            states.put(reader.index(places), read)
            found |= zip(places, logits_BU, strict=True)
        states.is_start = False
        return torch.stack([found[place] for place in range(len(rows))]), states

    def _remember(self, reader: Reader, rows: Sequence[Tokens], logits_BU: Tensor, states: ModelStates) -> None:
        if not self.remembered:
            return
        for place, row in enumerate(rows):
            self._recent.pop(row, None)
            self._recent[row] = Prefix(row, logits_BU[place : place + 1].clone(), states.take(reader.index([place])))
        for row in list(self._recent)[: -self.remembered]:
            del self._recent[row]


def _read_new(reader: Reader, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
    """New sequences, where rows that start alike share the reading of their starts."""
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    logits_BU, states = reader.read_shared([rows[row] for row in order])
    places = [0] * len(order)
    for place, row in enumerate(order):
        places[row] = place
    back_B = reader.index(places)
    return logits_BU.index_select(0, back_B), states.take(back_B)
