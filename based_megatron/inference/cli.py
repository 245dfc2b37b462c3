"""The command `based generate`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from based_megatron.config.limits import check_limits, flag
from based_megatron.errors import ConfigError
from based_megatron.inference.flags import DecodingFlags
from based_megatron.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face export, a checkpoint, or a run folder: its newest valid checkpoint."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeat the flag for more."""
    prompt_file: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """File whose whole text is a prompt; repeat the flag for more; - is standard input."""
    jsonl: Path | None = None
    """File of requests, one JSON object a line, with "prompt" and any of "stop" and the settings below; - is standard input."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """String that ends a text, and is no part of it; repeat the flag for more."""
    json: bool = False
    """Print a JSON line for each text that is finished."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = field(default_factory=DecodingFlags)
    save_prefix: Path | None = None
    """Read the one prompt, write its states to this file for --prefix, and generate nothing."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line, generate and print. Raises BasedError for what a user can fix."""
    config = tyro.cli(GenerateConfig, args=list(argv), prog="based generate")
    check_limits(config.decoding, flag)
    # They take seconds to load, which neither --help nor a typo should wait for.
    from based_megatron.inference.requests import STANDARD_INPUT, read_requests
    from based_megatron.parallel.environment import rank_from_environment

    info = rank_from_environment()
    if info.world_size > 1 and STANDARD_INPUT in (*config.prompt_file, config.jsonl):
        raise ConfigError(f"standard input reaches one of the {info.world_size} ranks only: give a file in place of -")
    if info.world_size > 1 and (config.decoding.prefix or config.save_prefix):
        raise ConfigError("saved states are those of a model on one rank: leave --prefix and --save-prefix out")
    requests = read_requests(config.prompt, config.prompt_file, config.jsonl, config.sampling, config.stop)
    if config.save_prefix is not None and len(requests) > 1:
        raise ConfigError(f"--save-prefix writes the states of one prompt, not of {len(requests)}: give one")
    from based_megatron.inference.decoder import load_by_flags
    from based_megatron.inference.generate import generate, save_prefix
    from based_megatron.parallel.megatron import megatron_runs
    from based_megatron.parallel.topology import leaving

    with leaving(), megatron_runs() if info.world_size > 1 else nullcontext():
        decoder = load_by_flags(config.model, config.decoding, most_requests=len(requests))
        if config.save_prefix is not None:
            save_prefix(decoder, requests[0], config.save_prefix)
        else:
            generate(decoder, requests, config.json, rank=info.rank, ranks=info.world_size)
