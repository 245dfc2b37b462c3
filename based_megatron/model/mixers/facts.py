"""The contract of a mixer: facts that its class states from a ModelConfig alone, without building the mixer.

Names of parameters are local to the mixer, such as `out_proj.weight`; shapes are those of the unsharded tensors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.config import ModelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.config import residual_std
from based_megatron.model.mixers.options import NoOptions, read_options
from based_megatron.parallel.sequence.carried import CarriedForm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SavedPiece:
    """What one rank keeps activations of: a slice of some sequences, and a part of the heads or channels."""

    sequences: int
    tokens: int
    """Tokens of each sequence on this rank."""
    number_bytes: int
    """Bytes of a number of the activations."""
    tensor: int = 1
    """Tensor parallel ranks that share heads and channels."""
    documents: bool = False
    """Whether tokens see their own document only."""

    def numbers(self, width: int) -> int:
        """Bytes of a tensor of so many channels a token, before they are shared."""
        return self.sequences * self.tokens * width // self.tensor * self.number_bytes


class MixerFacts(ABC):
    """Facts that a mixer must state (letter, name, parameter_shapes, mixing_flops), and those that have a usual answer."""

    letter: str
    """Letter in model.layer_pattern."""
    name: str
    """Name in counts, model cards and messages, with underscores."""
    rotates = False
    """True if the mixer needs rotary tables."""
    slices = False
    """True if the mixer can work on one slice of a sequence while context parallel ranks hold the others."""
    carries = False
    """Whether its carried state is all that the next sequence of the same document needs (data.carry_state)."""
    shards = True
    """Whether tensor parallel ranks can share its heads or channels."""
    isolates = True
    """Whether it keeps documents of a packed sequence apart (data.isolate_documents)."""
    Options: type = NoOptions
    """A frozen dataclass of the settings that only this mixer has, each with a default, a docstring and, where needed, a Range."""

    @classmethod
    def options(cls, model: ModelConfig) -> Any:
        """This mixer's `Options` as `model.mixer_options` sets them. Raises ConfigError for one that cannot be read."""
        return read_options(cls.Options, cls.name, model.mixer_options)

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        """Raise ConfigError, in one line, for sizes that the mixer cannot have, or cannot share over `tensor` ranks."""
        return  # Most mixers take all.

    @staticmethod
    @abstractmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        """Name and shape of each parameter."""

    @staticmethod
    @abstractmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token besides those of linear layers; a multiply-add is 2."""

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """Bytes that one layer keeps for its backward: outputs of its first projection up to inputs of its last, on one rank.

        The usual answer, an estimate, counts the output of every projection once and the input of the last.
        """
        widths = [
            shape[0]
            for name, shape in cls.parameter_shapes(model).items()
            if name.endswith(".weight") and len(shape) == 2
        ]
        return piece.numbers(sum(widths))

    @classmethod
    def linear_weights(cls, model: ModelConfig) -> int:
        """Weights that multiply each token once, 2 operations each: those of linear layers."""
        shapes = cls.parameter_shapes(model)
        return sum(prod(shape) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2)

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: biases 0, norms 1, `out_proj` N(0, init_std^2 / (2 layers)), all others N(0, init_std^2)."""
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        std = residual_std(model) if name == "out_proj.weight" else model.init_std
        return torch.empty(shape).normal_(0, std, generator=generator)

    @staticmethod
    def decays(name: str) -> bool:
        """True for a parameter with weight decay: all but biases and norms."""
        return not name.endswith((".bias", "norm.weight"))

    @staticmethod
    def tensor_dim(name: str) -> int | None:
        """The dim of a parameter that tensor parallel ranks share; None if each holds all of it.

        The usual answer: `out_proj` is cut along its input, norms and its bias not at all, everything else along dim 0.
        """
        if name.endswith("norm.weight") or name == "out_proj.bias":
            return None
        return 1 if name == "out_proj.weight" else 0

    @staticmethod
    def carried_forms(model: ModelConfig, dtype: torch.dtype) -> dict[str, CarriedForm]:
        """Shape and dtype of each carried state, what a training sequence leaves for the next one of its row, by kind.

        dtype: that of activations.
        """
        return {}

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The decoding state of `batch` empty sequences in a model of `dtype`: a dataclass of tensors.

        Raises ConfigError if there is no such form of constant size.
        """
        raise ConfigError(f"{cls.__name__} has no state of constant size to decode with: change model.layer_pattern")

    @classmethod
    def state_bytes(cls, model: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of the decoding state of one sequence. Raises ConfigError if it grows with the sequence."""
        state = cls.empty_state(model, 1, dtype, torch.device("meta"))
        return sum(tensor.nbytes for tensor in vars(state).values())

    hf_name: str | None = None
    """Name in the `mixers` of a Hugging Face config; None if the mixer cannot be exported."""
    hf_cache_layer = ""
    """Kind of the mixer's layer in the caches of transformers, such as linear_attention; only needed with an `hf_class`."""

    @staticmethod
    def hf_class() -> type[nn.Module] | None:
        """The mixer's class in an export, from a file that imports only torch and transformers and is copied into the export.

        None for those of `convert/hf_files/mixers_based.py`.
        """
        return None

    @classmethod
    def hf_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        """The tensors of `hf_class` whose rows, stacked, make this parameter."""
        return {name: cls.parameter_shapes(model)[name]}

    released_slot: str | None = None
    """Section of the mixer in config.json of the released checkpoints; None if the released code has no such mixer."""
    released_target = ""
    """Class of the mixer in the released code, as that section names it."""

    @staticmethod
    def released_settings(model: ModelConfig) -> dict[str, Any]:
        """The other keys of that section."""
        return {}

    @staticmethod
    def read_released(section: dict[str, Any]) -> dict[str, Any]:
        """The keys of ModelConfig that such a section sets. Raises CheckpointError for what we cannot run."""
        return {}

    @classmethod
    def released_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        """The released tensors whose rows, stacked, make this parameter."""
        return {name: cls.parameter_shapes(model)[name]}


def qkv_parts(name_format: str, rows: Shape, columns: int) -> dict[str, Shape]:
    """Parts of a fused q | k | v weight, where `name_format` has {} for the letter."""
    return {name_format.format(letter): (n, columns) for letter, n in zip("qkv", rows, strict=True)}
