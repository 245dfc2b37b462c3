"""The command `based serve`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config.limits import Range, check_limits, flag
from based_megatron.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a server takes from its clients."""

    queue: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 256
    """Requests that may wait for a slot; more are refused with status 429."""
    max_new_tokens: Annotated[int, Range(at_least=1)] = 4096
    """Most tokens that a request may ask for."""
    max_prompt_tokens: Annotated[int, Range(at_least=1)] = 65_536
    """Most tokens of a prompt."""
    max_body_bytes: Annotated[int, Range(at_least=1)] = 1_048_576
    """Most bytes of the body of a request."""
    request_seconds: Annotated[float, Range(above=0)] = 600.0
    """Time after which a request ends with what it has: finish_reason "timeout"."""
    body_seconds: Annotated[float, Range(above=0)] = 30.0
    """Time in which a client must have sent the body of its request."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine reach 0.0.0.0; set a token then."""
    port: Annotated[int, Range(at_least=0, at_most=65_535)] = 8000
    """Port to listen at; 0 takes a free one."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve a trained model over HTTP: /v1/completions as OpenAI's clients ask for it, /v1/models, /health, /metrics."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face export, a checkpoint, or a run folder: its newest valid checkpoint."""
    name: str = ""
    """Name of the model in answers. Default: that of the folder."""
    address: Annotated[Address, tyro.conf.arg(name="")] = field(default_factory=Address)
    token_file: Path | None = None
    """File with a secret that clients must send as their API key (Authorization: Bearer)."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: that of the export, or of the data folder of the run."""
    device: str = ""
    """Device to run on, cpu or cuda. Default: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of weights and activations. Default: bf16 on a GPU, fp32 on a CPU."""
    slots: int = 0
    """Texts that are decoded at once. Default: 128 on a GPU, 8 on a CPU."""
    threads: int = 0
    """Threads on a CPU. Default: one for a model of fewer than 20 million parameters, else those that torch takes."""
    reproducible: bool = False
    """Read prompts one by one: a text is then the same bit for bit whatever else is asked. Keeps no states of prompts."""
    remembered_prompts: int = 32
    """Prompts, those read last, whose states are kept: a prompt that starts with one of them goes on from there."""
    prefix: Path | None = None
    """File of `based generate --save-prefix` with the states of a start that prompts share."""
    mixers: str = ""
    """Modules of mixers that an export has and that are not ours, as in model.mixers."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line and serve until a signal. Raises BasedError for what a user can fix."""
    config = tyro.cli(ServeConfig, args=list(argv), prog="based serve")
    for settings in (config.address, config.limits):
        check_limits(settings, flag)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"based serve needs {' and '.join(missing)}, not installed here: pip install 'based-megatron[serve]'"
        )
    from based_megatron.serving.run import serve

    serve(config)
