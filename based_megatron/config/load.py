"""Reads a Config from a preset or a YAML file and command line overrides."""

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from based_megatron.config.schema import Config, SourceConfig
from based_megatron.errors import ConfigError

T = TypeVar("T")


def preset_names() -> list[str]:
    """Names of the presets in configs/."""
    folder = resources.files("based_megatron.configs")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str) -> Config:
    """Read a preset by name, or a YAML file by path. A file may start from another with `extends: NAME`.

    Raises ConfigError for an unknown name, an unknown key (with a suggestion) or a value of the wrong type.
    """
    return from_dict(_read(name_or_path), where=name_or_path)


def parse_config(argv: Sequence[str], prog: str = "based train") -> Config:
    """Config from a command line: `--config NAME_OR_PATH`, then any field as `--section.field value`."""
    argv = list(argv)
    name = None
    for i, arg in enumerate(argv):
        if arg == "--config" or arg.startswith("--config="):
            name = arg.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            del argv[i : i + (1 if "=" in arg else 2)]
            break
    if not name and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"no config given: add --config with a YAML file or one of {', '.join(preset_names())}")
    description = (
        f"Start from --config NAME (a YAML file, or one of: {', '.join(preset_names())}); every field can be set here."
    )
    return tyro.cli(
        Config, prog=prog, description=description, args=argv, default=load_config(name) if name else Config()
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, lists and numbers: what is saved with a run and inside a checkpoint."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], where: str = "config") -> Config:
    """The inverse of to_dict; missing keys take their defaults, unknown ones are errors."""
    data = values.get("data")
    if not isinstance(data, dict):
        return _merge(Config, values, where)
    entries = data.get("sources") or []
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"{where}: data.sources is {entries!r}; change data.sources to a list of entries with path and weight"
        )
    sources = tuple(_merge(SourceConfig, entry, where) for entry in entries)
    config = _merge(Config, {**values, "data": {key: data[key] for key in data if key != "sources"}}, where)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that load_config reads."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no config file {name_or_path}: give a YAML file or one of {', '.join(preset_names())}")
        text = path.read_text()
    elif name_or_path in preset_names():
        text = resources.files("based_megatron.configs").joinpath(f"{name_or_path}.yaml").read_text()
    else:
        raise ConfigError(f"unknown config {name_or_path!r}: give a YAML file or one of {', '.join(preset_names())}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path} holds a {type(values).__name__}, not sections and keys")
    base = values.pop("extends", None)
    return OmegaConf.to_container(OmegaConf.merge(_read(base), values)) if base else values  # type: ignore[return-value]


def _merge(cls: type[T], values: dict[str, Any], where: str) -> T:
    schema = OmegaConf.structured(cls)
    _unlock(schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]} (key {key})") from error


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
