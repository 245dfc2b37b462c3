"""The command `based launch`: the ranks of a command, started on this machine or as a SLURM job."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from based_megatron.errors import ConfigError
from based_megatron.launchers.local import LocalOptions, launch_local
from based_megatron.launchers.script import SlurmOptions
from based_megatron.launchers.slurm import launch_slurm

Options = (
    Annotated[LocalOptions, tyro.conf.subcommand("local")] | Annotated[SlurmOptions, tyro.conf.subcommand("slurm")]
)


def main(argv: Sequence[str]) -> int:
    """Run `local OPTIONS -- train ...` or `slurm OPTIONS -- train ...`; what follows -- is a `based` command.

    Returns the exit code. Raises ConfigError if there is no command, or if it cannot be launched.
    """
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    command = argv[cut + 1 :]
    options = tyro.cli(  # type: ignore[call-overload]
        Options,
        prog="based launch",
        description="Start the ranks of a command: `based launch local --nproc 8 -- train --config based-360m`.",
        args=argv[:cut],
    )
    if not command:
        raise ConfigError("no command to launch; put it after --, for example: -- train --config based-360m")
    return launch_local(options, command) if isinstance(options, LocalOptions) else launch_slurm(options, command)
