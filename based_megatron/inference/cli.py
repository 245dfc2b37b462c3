"""The command `based generate`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config.limits import check_limits, flag
from based_megatron.errors import ConfigError
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
    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: that of the export, or of the data folder of the run."""
    device: str = ""
    """Device to run on, cpu or cuda. Default: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of weights and activations. Default: bf16 on a GPU, fp32 on a CPU."""
    slots: int = 0
    """Texts that are decoded at once; others wait for a free slot. Default: one for each prompt, at most 128 on a GPU and 8 on a CPU."""
    threads: int = 0
    """Threads on a CPU. Default: one for a model of fewer than 20 million parameters, else those that torch takes."""
    reproducible: bool = False
    """Read prompts one by one: a text is then the same bit for bit whatever else is asked, with the same --slots."""
    prefix: Path | None = None
    """File with the states of a start that prompts share: those that begin with it are not read again from there."""
    save_prefix: Path | None = None
    """Read the one prompt, write its states to this file for --prefix, and generate nothing."""
    mixers: str = ""
    """Modules of mixers that an export has and that are not ours, as in model.mixers."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line, generate and print. Raises BasedError for what a user can fix."""
    config = tyro.cli(GenerateConfig, args=list(argv), prog="based generate")
    # They take seconds to load, which neither --help nor a typo should wait for.
    from based_megatron.inference.requests import STANDARD_INPUT, read_requests
    from based_megatron.parallel.environment import rank_from_environment

    info = rank_from_environment()
    if info.world_size > 1 and STANDARD_INPUT in (*config.prompt_file, config.jsonl):
        raise ConfigError(f"standard input reaches one of the {info.world_size} ranks only: give a file in place of -")
    if info.world_size > 1 and (config.prefix or config.save_prefix):
        raise ConfigError("saved states are those of a model on one rank: leave --prefix and --save-prefix out")
    requests = read_requests(config.prompt, config.prompt_file, config.jsonl, config.sampling, config.stop)
    if config.save_prefix is not None and len(requests) > 1:
        raise ConfigError(f"--save-prefix writes the states of one prompt, not of {len(requests)}: give one")
    from based_megatron.inference.decoder import Placement, load_decoder
    from based_megatron.inference.generate import generate, save_prefix
    from based_megatron.parallel.megatron import megatron_runs
    from based_megatron.parallel.topology import leaving

    placement = Placement(
        device=config.device,
        precision=config.precision,
        slots=config.slots,
        threads=config.threads,
        reproducible=config.reproducible,
        most_requests=len(requests),
    )
    check_limits(placement, flag)
    with leaving(), megatron_runs() if info.world_size > 1 else nullcontext():
        decoder = load_decoder(
            config.model, placement, tokenizer=config.tokenizer, prefix=config.prefix, mixers=config.mixers
        )
        if config.save_prefix is not None:
            save_prefix(decoder, requests[0], config.save_prefix)
        else:
            generate(decoder, requests, config.json, rank=info.rank, ranks=info.world_size)
