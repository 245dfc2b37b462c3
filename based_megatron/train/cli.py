"""The command `based train`: what it refuses by its settings alone, it refuses before the seconds that PyTorch takes to load."""

import time
from collections.abc import Sequence
from pathlib import Path

from based_megatron import __version__
from based_megatron.errors import BasedError
from based_megatron.process import leave_cause, rank_name
from based_megatron.train.signals import StopSignals


def main(argv: Sequence[str]) -> None:
    """Print the settings, check them, or train on this rank."""
    signals = StopSignals()  # first of all, or a stop during the imports would kill this rank
    try:
        _run(argv, signals)
    except BasedError as error:
        if not signals.received or error.exit_code != BasedError.exit_code or rank_name() in ("", "0"):
            raise
        # The launcher is ending this rank already: rank 0 was refused too, and has said why.
        leave_cause(error)
        raise SystemExit(error.exit_code) from error


def _run(argv: Sequence[str], signals: StopSignals) -> None:
    from based_megatron.config.command_line import describe, parse_command
    from based_megatron.config.limits import absolute_paths
    from based_megatron.config.validate import validate
    from based_megatron.parallel.environment import rank_from_environment

    command = parse_command(argv)
    if command.print_config:
        print(describe(argv), end="")
        return
    config, rank = absolute_paths(command.settings), rank_from_environment()
    validate(config, rank.world_size)
    if rank.rank == 0:
        now = time.strftime("%H:%M:%S")
        ranks = "1 rank" if rank.world_size == 1 else f"{rank.world_size} ranks"
        print(f"{now} based {__version__}: {ranks}, run folder {config.run_dir}; loading PyTorch", flush=True)
    if not command.dry_run:
        from based_megatron.train.failure import as_line
        from based_megatron.train.train import train

        try:
            train(config, signals)
        except Exception as error:
            raise as_line(error, Path(config.run_dir), rank.rank) from error
        return
    from based_megatron.run_folder.lock import check_free
    from based_megatron.train.accept import accept
    from based_megatron.train.identity import identify

    sources = accept(config, rank.world_size, rank.rank)
    if rank.rank == 0:
        check_free(Path(config.run_dir))
        identify(config, sources.fingerprint)
        for planned in sources.plan(config.train.steps * config.train.global_batch_sequences):
            print(planned)
        print(
            "this run can start: settings, data, run folder and the least memory have been checked, nothing was written"
        )
