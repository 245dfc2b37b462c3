"""The command line of `based train`: a preset or file, settings that override it, and where each value comes from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
import yaml

from based_megatron.config.load import Layer, from_layers, preset_names, read_layers, to_dict
from based_megatron.config.schema import Config, SourceConfig
from based_megatron.errors import ConfigError

ORIGIN_COLUMN = 48


@dataclass(frozen=True)
class TrainCommand:
    """Pretrain. Start from --config; every field of it can be set here as well. Every rank runs this."""

    config: str = ""
    """A YAML file, or the name of a preset. Needed."""
    print_config: bool = False
    """Print every setting as YAML, each with its origin, and do nothing else."""
    dry_run: bool = False
    """Check everything that can be checked without a GPU, say whether the run could start, and write nothing."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_command(argv: Sequence[str], prog: str = "based train") -> TrainCommand:
    """The whole command line. Raises ConfigError for a config that is missing or that cannot be read."""
    name = _config_name(argv)
    helps = bool({"-h", "--help"} & set(argv))
    if not name and not helps:
        raise ConfigError(f"no config given: add --config with a YAML file or one of {', '.join(preset_names())}")
    return tyro.cli(
        TrainCommand,
        prog=prog,
        description=f"{TrainCommand.__doc__} Presets: {', '.join(preset_names())}.",
        args=list(argv),
        default=TrainCommand(settings=from_layers(read_layers(name)) if name else Config()),
        registry=_registry(),
    )


def parse_config(argv: Sequence[str], prog: str = "based train") -> Config:
    """The settings of a command line: `--config NAME_OR_PATH`, then any field as `--section.field value`."""
    return parse_command(argv, prog).settings


def describe(argv: Sequence[str]) -> str:
    """YAML of every setting of a command line, each with a comment that says where its value comes from."""
    command = parse_command(argv)
    layers = read_layers(command.config)
    flags = {arg.partition("=")[0].removeprefix("--").replace("_", "-") for arg in argv if arg.startswith("--")}
    return "".join(_described(to_dict(command.settings), (), layers, flags))


def _described(
    values: dict[str, Any], above: tuple[str, ...], layers: Sequence[Layer], flags: set[str]
) -> Iterator[str]:
    """Lines of the settings below the sections `above`."""
    indent = "  " * len(above)
    for name, value in values.items():
        keys = (*above, name)
        if isinstance(value, dict):
            yield f"{indent}{name}:\n"
            yield from _described(value, keys, layers, flags)
        else:
            # In flow style, without the braces: one line, whatever the value.
            text = indent + yaml.safe_dump({name: value}, default_flow_style=True, width=math.inf).strip()[1:-1]
            yield f"{text:{ORIGIN_COLUMN}}  # {_origin(keys, layers, flags)}\n"


def _origin(keys: tuple[str, ...], layers: Sequence[Layer], flags: set[str]) -> str:
    *sections, name = (key.replace("_", "-") for key in keys)
    if flags & {".".join([*sections, name]), ".".join([*sections, f"no-{name}"])}:
        return "command line"
    return next((layer.origin for layer in reversed(layers) if _sets(layer.values, keys)), "default")


def _sets(values: Any, keys: tuple[str, ...]) -> bool:
    return not keys or (isinstance(values, dict) and keys[0] in values and _sets(values[keys[0]], keys[1:]))


def _config_name(argv: Sequence[str]) -> str:
    """The value of the last --config; it is needed before tyro parses, whose defaults it gives."""
    name = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=False):
        if arg == "--config":
            name = following
        elif arg.startswith("--config="):
            name = arg.partition("=")[2]
    return name


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Lets tyro read a source of a mixture from one word: PATH, PATH=WEIGHT or PATH=WEIGHT:MAX_EPOCHS."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def source(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not SourceConfig:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH=WEIGHT:MAX_EPOCHS",
            instance_from_str=lambda words: _source(words[0]),
            is_instance=lambda value: isinstance(value, SourceConfig),
            str_from_instance=lambda value: [f"{value.path}={value.weight!r}:{value.max_epochs!r}"],
        )

    return registry


def _source(word: str) -> SourceConfig:
    path, equals, numbers = word.rpartition("=")
    return SourceConfig(path, *map(float, numbers.split(":", 1))) if equals else SourceConfig(word)
