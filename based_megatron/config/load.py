"""Reads a Config from a preset or a YAML file, and writes it back."""

import dataclasses
import functools
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from based_megatron.config.schema import Config, SourceConfig
from based_megatron.config.yaml_files import parse_yaml, read_yaml, write_yaml
from based_megatron.errors import ConfigError

T = TypeVar("T")
REMOVED = ("allow_changed",)
"""Settings of `data` that saved configs of earlier versions have: they are left out."""
FORMER = {"data": {"cross_blocks": False}}
"""What runs did before there was a setting for it, where its default is another."""


@dataclass(frozen=True)
class Layer:
    """The values that one preset or file sets."""

    origin: str
    """Where they come from, such as `preset tiny`."""
    values: dict[str, Any]


def preset_names() -> list[str]:
    """Names of the presets in configs/."""
    folder = resources.files("based_megatron.configs")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str) -> Config:
    """Read a preset by name, or a YAML file by path. A file may start from another with `extends: NAME`.

    Raises ConfigError for an unknown name, an unknown key (with a suggestion) or a value of the wrong type.
    """
    return from_layers(read_layers(name_or_path))


def read_layers(name_or_path: str) -> list[Layer]:
    """The preset or file and all that it extends, the one that others build on first. Raises ConfigError."""
    layers: list[Layer] = []
    seen: set[str] = set()
    name: str | None = name_or_path
    while name is not None:
        layer = _read(name)
        if layer.origin in seen:
            raise ConfigError(f"{name} extends itself, by way of {len(seen)} files; change extends")
        seen.add(layer.origin)
        name = layer.values.pop("extends", None)
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"{layer.origin}: extends is {name!r:.80}, not a name or a path; change extends")
        layers.insert(0, layer)
    return layers


def from_layers(layers: list[Layer]) -> Config:
    """The config of some layers, the last of which wins. Raises ConfigError."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _overlaid(values, layer.values)
    return from_dict(values, where=layers[-1].origin)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, lists and numbers: what is saved with a run and inside a checkpoint."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], where: str = "config") -> Config:
    """The inverse of to_dict; missing keys take their defaults, unknown ones are errors."""
    _check_sections(Config, values, where)
    data = values.get("data", {})
    entries = data.get("sources") or []
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"{where}: data.sources is {entries!r:.200}; change data.sources to a list of entries with path and weight"
        )
    sources = tuple(_merge(SourceConfig, entry, where) for entry in entries)
    if data:
        values = {**values, "data": {key: data[key] for key in data if key not in ("sources", *REMOVED)}}
    config = _merge(Config, values, where)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def with_former_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """The config of a run, with what it did without a word where its version had no setting for it."""
    return _overlaid(FORMER, saved)


def load_run_config(path: Path) -> Config:
    """The config.yaml of a run folder, of whatever version. Raises ConfigError."""
    return from_layers([Layer("former settings", FORMER), *read_layers(str(path))])


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that load_config reads, whole or not at all."""
    write_yaml(to_dict(config), path)


def _read(name_or_path: str) -> Layer:
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        if not os.path.exists(name_or_path):
            raise ConfigError(f"no config file {name_or_path}: give a YAML file or one of {', '.join(preset_names())}")
        return Layer(f"file {os.path.realpath(name_or_path)}", read_yaml(Path(name_or_path)))
    if name_or_path in preset_names():
        text = resources.files("based_megatron.configs").joinpath(f"{name_or_path}.yaml").read_text()
        return Layer(f"preset {name_or_path}", parse_yaml(text, name_or_path))
    raise ConfigError(f"unknown config {name_or_path!r:.200}: give a YAML file or one of {', '.join(preset_names())}")


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _overlaid(below[key], above[key]) for key in both}}


def _check_sections(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> None:
    for name, hint in get_type_hints(cls).items():
        if not dataclasses.is_dataclass(hint) or name not in values:
            continue
        if not isinstance(values[name], dict):
            raise ConfigError(
                f"{where}: {prefix}{name!r} is {values[name]!r:.200}, not the keys of a {hint.__name__}; change {prefix}{name}"  # type: ignore[union-attr]
            )
        _check_sections(hint, values[name], where, f"{prefix}{name}.")  # type: ignore[arg-type]


def _merge(cls: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return OmegaConf.to_object(OmegaConf.merge(_defaults(cls), values))  # type: ignore[return-value, arg-type]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]:.300} (key {key!r:.100})") from error


@functools.cache
def _defaults(cls: type) -> DictConfig:
    """The settings of a class; a merge copies them."""
    schema = OmegaConf.structured(cls)
    _unlock(schema)
    return schema


def _unlock(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes, which refuse a merge."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
