"""The runs of a sweep: one for each combination of values."""

import itertools
from collections.abc import Sequence

from based_megatron.config import parse_config
from based_megatron.errors import ConfigError


def sweep_commands(command: Sequence[str], sweep: Sequence[str]) -> list[list[str]]:
    """The train commands of all combinations, each with a run folder of its own; the command itself if nothing is swept.

    sweep: entries such as optimizer.lr=1e-3,8e-4.
    """
    if not sweep:
        return [list(command)]
    settings = [_setting(entry) for entry in sweep]
    keys = [key for key, _ in settings]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--sweep names a setting twice: {', '.join(keys)}; give all of its values in one --sweep")
    folder = parse_config(command[1:]).run_dir
    points = itertools.product(*(values for _, values in settings))
    return [_command(command, folder, dict(zip(keys, point, strict=True))) for point in points]


def _setting(entry: str) -> tuple[str, list[str]]:
    key, _, text = entry.partition("=")
    values = text.split(",")
    if not key or not all(values) or len(set(values)) < len(values) or "/" in entry:
        raise ConfigError(
            f"--sweep {entry!r} is not a setting with different values (without a /, which no folder's name can have); write it as "
            f"--sweep optimizer.lr=1e-3,8e-4"
        )
    return key.replace("-", "_"), values


def _command(command: Sequence[str], folder: str, point: dict[str, str]) -> list[str]:
    name = ",".join(f"{key}={value}" for key, value in point.items())
    words = [word for key, value in point.items() for word in _override(key, value)]
    return [*command, *words, "--run-dir", f"{folder}/{name}"]


def _override(key: str, value: str) -> list[str]:
    """Words of the command line that set a value. Switches are words without one."""
    section, dot, name = key.replace("_", "-").rpartition(".")
    if value in ("true", "false"):
        return [f"--{section}{dot}{'' if value == 'true' else 'no-'}{name}"]
    return [f"--{section}{dot}{name}", value]
