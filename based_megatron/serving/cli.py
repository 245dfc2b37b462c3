"""The command `based serve`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from based_megatron.config.limits import Range, check_limits, flag
from based_megatron.errors import ConfigError
from based_megatron.inference.flags import DecodingFlags


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
    remembered_prompts: Annotated[int, Range(at_least=0, at_most=65_536)] = 32
    """Prompts, those read last, whose states are kept: a prompt that starts with one of them goes on from there. None with
    --reproducible."""


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
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = field(default_factory=DecodingFlags)


def main(argv: Sequence[str]) -> None:
    """Parse the command line and serve until a signal. Raises BasedError for what a user can fix."""
    config = tyro.cli(ServeConfig, args=list(argv), prog="based serve")
    for settings in (config.address, config.limits, config.decoding):
        check_limits(settings, flag)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"based serve needs {' and '.join(missing)}, not installed here: pip install 'based-megatron[serve]'"
        )
    from based_megatron.serving.run import serve

    serve(config)
