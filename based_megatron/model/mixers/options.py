"""Options of mixers: the words NAME.KEY=VALUE of `model.mixer_options`, read into a dataclass that the mixer declares."""

import functools
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from based_megatron.config.limits import check_limits
from based_megatron.errors import ConfigError

Schema = TypeVar("Schema")
BOOLEANS = {"true": True, "false": False}
WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class NoOptions:
    """The options of a mixer that has none."""


def split_option(word: str) -> tuple[str, str, str]:
    """(name of the mixer, key, value) of NAME.KEY=VALUE. Raises ConfigError for any other form."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", word)
    if match is None:
        raise ConfigError(
            f"model.mixer_options has {word!r:.100}, which is not of the form NAME.KEY=VALUE; change model.mixer_options"
        )
    name, key, value = match.groups()
    return name, key, value


@functools.lru_cache
def read_options(schema: type[Schema], name: str, words: tuple[str, ...]) -> Schema:
    """The options of one mixer: those that the words set, and defaults.

    schema: a frozen dataclass of fields that are int, float, bool, str or a Literal of texts, each with a default.
    Raises ConfigError for an unknown key, one that is set twice, and a value that is not of its type or outside its limits.
    """
    hints, values = get_type_hints(schema), dict[str, Any]()
    for mixer, key, text in map(split_option, words):
        if mixer != name:
            continue
        if key not in hints:
            close = get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(hints) or 'none'}"
            raise ConfigError(
                f"model.mixer_options sets {name}.{key}, which is no option of this mixer ({hint}); change model.mixer_options"
            )
        if key in values:
            raise ConfigError(f"model.mixer_options sets {name}.{key} twice; change model.mixer_options")
        values[key] = _parsed(hints[key], text, f"{name}.{key}")
    options = schema(**values)
    check_limits(options, lambda key: f"model.mixer_options {name}.{key}")
    return options


def _parsed(kind: Any, text: str, key: str) -> Any:
    choices = {choice: choice for choice in get_args(kind)} if get_origin(kind) is Literal else None
    try:
        if choices is not None or kind is bool:
            return (BOOLEANS if choices is None else choices)[text]
        return kind(text)
    except (KeyError, ValueError):
        wanted = WANTED.get(kind) or f"one of {', '.join(choices or ())}"
        raise ConfigError(
            f"model.mixer_options sets {key} to {text!r:.100}, but it must be {wanted}; change model.mixer_options"
        ) from None
