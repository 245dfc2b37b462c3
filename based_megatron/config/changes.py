"""What a changed setting does to a run that goes on: each field of the schema says whether it is free, or part of what the run is."""

import dataclasses
import enum
import functools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from based_megatron.errors import ConfigError

MISSING = object()


class Resume(enum.Enum):
    """Marks a field of the schema, or a section for all of its fields that have no mark of their own."""

    FREE = "free"
    """May change when a run goes on: it trains the same model on the same data by the same rule."""
    FIXED = "fixed"
    """Is part of what the run is: a changed value is refused unless `checkpoint.allow_changed` names it."""


@functools.cache
def resume_marks(schema: type) -> Mapping[str, Resume | None]:
    """The mark of every key of a schema; None for one that has forgotten to choose."""
    return dict(_marks(schema, None, ""))


def changed_settings(schema: type, then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings of a saved config that differ now, as [then, now]. What only one of the two versions of the schema has is left out."""
    found = {}
    for key in resume_marks(schema):
        old, new = _value(then, key), _value(now, key)
        if MISSING not in (old, new) and old != new:
            found[key] = [old, new]
    return found


def refused_changes(schema: type, changes: dict[str, list[Any]], allowed: Sequence[str]) -> dict[str, list[Any]]:
    """The changes that make another run of it and that nobody has allowed by the name of the setting or of its section."""
    fixed = {key for key, mark in resume_marks(schema).items() if mark is not Resume.FREE}
    return {key: values for key, values in changes.items() if key in fixed and not is_allowed(key, allowed)}


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Whether a setting is named, or one of the sections that it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def check_allowed(schema: type, allowed: Sequence[str]) -> None:
    """Raise ConfigError for a name that is neither a setting nor a section."""
    keys = resume_marks(schema)
    names = {key[:end] for key in keys for end, sign in enumerate(f"{key}.") if sign == "."}
    for name in allowed:
        if name not in names:
            close = get_close_matches(name, sorted(names), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"checkpoint.allow_changed has {name!r:.80}, which is no setting and no section{hint}; change checkpoint.allow_changed"
            )


def describe_changes(changes: dict[str, list[Any]]) -> str:
    """The changes in words, on one line."""
    return ", ".join(f"{key} {_shown(then)} -> {_shown(now)}" for key, (then, now) in changes.items())


def _marks(schema: type, inherited: Resume | None, prefix: str) -> Iterator[tuple[str, Resume | None]]:
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        mark = next((mark for mark in marks if isinstance(mark, Resume)), inherited)
        if dataclasses.is_dataclass(kind):
            yield from _marks(kind, mark, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, mark


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return MISSING
        config = config[name]
    return config


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
