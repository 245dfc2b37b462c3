"""Mixers by the letters of a layer pattern: ours, those of installed packages, and those that `model.mixers` names."""

import functools
import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType

import torch

from based_megatron.config import ModelConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.errors import ConfigError
from based_megatron.model.mixers.attention import FullAttention, SlidingWindowAttention
from based_megatron.model.mixers.base import Mixer
from based_megatron.model.mixers.gated_conv import GatedConv
from based_megatron.model.mixers.linear_attention import TaylorLinearAttention
from based_megatron.model.mixers.options import split_option

ENTRY_POINTS = "based_megatron.mixers"
"""Group in which an installed package names its modules of mixers."""
MIXERS: dict[str, type[Mixer]] = {
    mixer.letter: mixer for mixer in (GatedConv, TaylorLinearAttention, SlidingWindowAttention, FullAttention)
}
"""Our own mixers."""


def mixers_of(model: ModelConfig) -> dict[str, type[Mixer]]:
    """All mixers that a model may use, by letter. Raises ConfigError for a module or a mixer that cannot be used."""
    return dict(_found(model.mixers))


@functools.lru_cache
def layer_mixers(model: ModelConfig) -> tuple[type[Mixer], ...]:
    """The mixer of each layer. Raises ConfigError for a letter that no mixer has, and for options that none of them can read."""
    known, letters = mixers_of(model), parse_layer_pattern(model.layer_pattern)
    unknown = sorted(set(letters) - set(known))
    if unknown:
        raise ConfigError(
            f"cannot read {' '.join(unknown)!r} in layer pattern {model.layer_pattern!r}: groups such as cLScc*5, with letters "
            f"{', '.join(f'{letter} ({mixer.name})' for letter, mixer in known.items())}; change model.layer_pattern, or add the "
            f"module of the mixer to model.mixers"
        )
    layers = tuple(known[letter] for letter in letters)
    _check_options(model, set(layers))
    return layers


def _check_options(model: ModelConfig, mixers: set[type[Mixer]]) -> None:
    names = {mixer.name for mixer in mixers}
    for word in model.mixer_options:
        name = split_option(word)[0]
        if name not in names:
            raise ConfigError(
                f"model.mixer_options has {word!r:.100}, but the mixers of model.layer_pattern {model.layer_pattern!r} are "
                f"{', '.join(sorted(names))}; change model.mixer_options or model.layer_pattern"
            )
    for mixer in mixers:
        mixer.options(model)


def parameter_owner(name: str, layers: tuple[type[Mixer], ...]) -> tuple[type[Mixer], str] | None:
    """(mixer, local name) of a parameter such as `layers.3.mixer.out_proj.weight`; None if it is no mixer's."""
    if not name.startswith("layers."):
        return None
    _, index, part, local = name.split(".", 3)
    return (layers[int(index)], local) if part == "mixer" else None


def has_states(model: ModelConfig) -> bool:
    """Whether every layer has a decoding state of constant size."""
    try:
        for mixer in set(layer_mixers(model)):
            mixer.empty_state(model, 0, torch.float32, torch.device("cpu"))
    except ConfigError:
        return False
    return True


@functools.cache
def _found(names: str) -> dict[str, type[Mixer]]:
    found = dict(MIXERS)
    for mixer in _external(names):
        missing = [] if hasattr(mixer, "name") else ["name"]
        missing += sorted(mixer.__abstractmethods__)
        if missing:
            raise ConfigError(
                f"the mixer {_full_name(mixer)} does not say its {', '.join(missing)} (docs/extending.md); change model.mixers"
            )
        for other in found.values():
            for fact in ("letter", "name", "hf_name"):
                value = getattr(mixer, fact)
                if value is not None and value == getattr(other, fact):
                    raise ConfigError(
                        f"the mixers {_full_name(other)} and {_full_name(mixer)} both have the {fact} {value!r}: model.layer_pattern "
                        f"needs one mixer a {fact}; change one of them, or model.mixers"
                    )
        found[mixer.letter] = mixer
        if len(mixer.letter) != 1 or not (mixer.letter.isascii() and mixer.letter.isalpha()):
            raise ConfigError(
                f"the mixer {_full_name(mixer)} has the letter {mixer.letter!r}, which is not one of A-Z and a-z; change model.mixers"
            )
    return found


def _external(names: str) -> Iterator[type[Mixer]]:
    """The mixers of all named modules, each once, also where a package and one of its modules are named."""
    modules = [entry.module for entry in entry_points(group=ENTRY_POINTS)]
    modules += [name.strip() for name in names.split(",") if name.strip()]
    yield from dict.fromkeys(mixer for name in modules for mixer in _mixers_in(_imported(name)))


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"cannot import the mixers of {name!r} ({type(error).__name__}: {words}); change model.mixers, or the installed package "
            f"whose entry point in {ENTRY_POINTS} names it"
        ) from error


def _mixers_in(module: ModuleType) -> list[type[Mixer]]:
    """Classes with a letter that the module defines, or that a package has from its own modules; others are their bases."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Mixer)]
    own = [cls for cls in classes if f"{cls.__module__}.".startswith(f"{module.__name__}.")]
    mixers = [cls for cls in own if hasattr(cls, "letter")]
    if not mixers:
        raise ConfigError(f"{module.__name__} defines no Mixer with a letter (docs/extending.md); change model.mixers")
    return mixers


def _full_name(mixer: type[Mixer]) -> str:
    return f"{mixer.__module__}.{mixer.__qualname__}"
