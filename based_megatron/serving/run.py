"""One run of `based serve`: the model on its device, the socket, and the server between them."""

import ipaddress
import socket
import sys
from pathlib import Path

import uvicorn

from based_megatron.errors import ConfigError
from based_megatron.inference.decoder import load_by_flags
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import leaving
from based_megatron.serving.app import build_app
from based_megatron.serving.cli import ServeConfig
from based_megatron.serving.worker import Worker

KEEP_ALIVE_SECONDS, SHUTDOWN_SECONDS = 30, 5
CONNECTIONS_A_REQUEST = 2
"""Connections that are accepted, over the requests that may wait: idle ones too."""


def serve(config: ServeConfig) -> None:
    """Serve until a signal. Raises BasedError for what a user can fix, before the model is loaded where that can be."""
    if rank_from_environment().world_size > 1:
        raise ConfigError("based serve runs on one rank: start it without based launch")
    token = None if config.token_file is None else read_token(config.token_file)
    with listening(config.address.host, config.address.port) as bound, leaving():
        remembered = 0 if config.decoding.reproducible else config.limits.remembered_prompts
        decoder = load_by_flags(config.model, config.decoding, remembered_prompts=remembered)
        name = config.name or config.model.resolve().name
        worker = Worker(decoder, config.limits.queue)
        host, port = bound.getsockname()[:2]
        if token is None and not ipaddress.ip_address(host).is_loopback:
            print(f"based: warning: everyone who reaches {host} can use this server: set --token-file", file=sys.stderr)
        print(f"serving {name} at http://{host}:{port}/v1, {decoder.loop.slots} texts at once", flush=True)
        settings = uvicorn.Config(
            build_app(worker, name, config.limits, token),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            limit_concurrency=CONNECTIONS_A_REQUEST * (config.limits.queue + decoder.loop.slots),
        )
        uvicorn.Server(settings).run(sockets=[bound])


def listening(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at --host {host} --port {port}: {error.strerror or error}; choose others"
        ) from error


def read_token(path: Path) -> str:
    """The secret in a file. Raises ConfigError if there is none."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --token-file {path}: {error}") from error
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"--token-file {path} must hold one word of ASCII letters, digits and signs")
    return token
