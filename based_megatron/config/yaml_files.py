"""YAML files of settings: read strictly, written whole or not at all."""

from pathlib import Path
from typing import Any

import yaml

from based_megatron.errors import ConfigError
from based_megatron.run_folder.whole_file import whole_file

MOST_BYTES = 1 << 16
MOST_BRACKETS = 20
SAVED_HEADER = "# Every setting of a run. The file is complete if its last line is three dots.\n"


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can make a small file fill the memory, and no key twice, of which one would be lost."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        # The time that PyYAML takes grows with the square of the open brackets.
        if self.flow_level == MOST_BRACKETS:
            raise yaml.MarkedYAMLError(problem="is nested too deeply for a config", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="found an alias (*); write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"found the key {key.value} twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Sections and keys of a file. Raises ConfigError, in one line, for anything else."""
    try:
        size_bytes = path.stat().st_size
        content = path.read_bytes() if size_bytes <= MOST_BYTES and path.is_file() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    if content is None:
        raise ConfigError(f"{path} is no file of at most {MOST_BYTES:,} bytes: give a YAML file of settings")
    try:
        return parse_yaml(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Sections and keys of a YAML text. Raises ConfigError, in one line, for anything else."""
    try:
        values = yaml.load(text, _StrictLoader)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply for a config") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # What the constructors of numbers, dates and binary data raise is no YAMLError.
        raise ConfigError(f"{where} is not YAML that can be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds a {type(values).__name__}, not sections and keys")
    if text.startswith(SAVED_HEADER) and not text.rstrip().endswith("\n..."):
        raise ConfigError(f"{where} is cut off: its last line must be three dots; take the config of a checkpoint")
    return values


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Replace the file by these values, atomically; a copy that is cut off later is recognised. Raises OSError."""
    text = SAVED_HEADER + yaml.safe_dump(values, sort_keys=False, explicit_end=True)
    with whole_file(path, durable=True) as stream:
        stream.write(text)
