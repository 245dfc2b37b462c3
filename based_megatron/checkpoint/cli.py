"""The command `based ckpt`: look at the checkpoints of a run. PyTorch is imported after the command line is read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

PathArgument = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str]) -> int:
    """Run one of ls, inspect and verify; returns the exit code. Raises CheckpointError."""
    commands: dict[str, Callable[..., Any]] = {"ls": ls, "inspect": inspect, "verify": verify}
    return tyro.extras.subcommand_cli_from_dict(
        commands, prog="based ckpt", args=list(argv), description="Look at the checkpoints of a run."
    )


def ls(run: PathArgument) -> int:
    """List the checkpoints of a run folder, newest first."""
    from based_megatron.checkpoint.show import show_run

    return show_run(run)


def inspect(path: PathArgument, tensors: bool = False) -> int:
    """Show the state of a checkpoint (a run folder means its newest), and with --tensors every parameter."""
    from based_megatron.checkpoint.show import show_checkpoint

    return show_checkpoint(path, tensors)


def verify(path: PathArgument) -> int:
    """Compare the files of a checkpoint, or of all of a run, with their manifest; exit code 1 if one differs."""
    from based_megatron.checkpoint.show import show_damage

    return show_damage(path)
