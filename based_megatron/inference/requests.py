"""The requests of a command line: prompts from flags, files, standard input and JSON lines."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from based_megatron.errors import ConfigError
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.text import TextRequest, check_request

STANDARD_INPUT = Path("-")
NUMBERS = {name: hint for name, hint in get_type_hints(Sampling).items()}


def read_requests(
    prompts: Sequence[str], files: Sequence[Path], jsonl: Path | None, sampling: Sampling, stop: tuple[str, ...]
) -> list[TextRequest]:
    """All requests, in the order of the parameters.

    files: a prompt each, the whole text; `-` is standard input. jsonl: see `json_requests`.
    Raises ConfigError for none, and for the first that cannot be.
    """
    found = [TextRequest(prompt, sampling, stop) for prompt in prompts]
    found += [TextRequest(_text(file, "--prompt-file"), sampling, stop) for file in files]
    if jsonl is not None:
        found += json_requests(_text(jsonl, "--jsonl"), str(jsonl), sampling, stop)
    if not found:
        raise ConfigError("there is no prompt: give --prompt, --prompt-file or --jsonl")
    for request in found:
        check_request(request)
    return found


def json_requests(text: str, where: str, sampling: Sampling, stop: tuple[str, ...]) -> Iterator[TextRequest]:
    """A request for each line: an object with `prompt`, and `stop` and settings of `Sampling` that differ from the given ones."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json_request(json.loads(line), sampling, stop)
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"line {number} of {where} is no request: {error}; change it") from error


def json_request(entry: Any, sampling: Sampling, stop: tuple[str, ...]) -> TextRequest:
    """The request that an object asks for. Raises ConfigError for unknown keys and values of other types."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ConfigError('it has no text "prompt"')
    unknown = sorted(entry.keys() - NUMBERS.keys() - {"prompt", "stop"})
    if unknown:
        raise ConfigError(f"{', '.join(map(repr, unknown))} is none of prompt, stop, {', '.join(NUMBERS)}")
    changes = {name: _number(name, entry[name]) for name in entry.keys() & NUMBERS.keys()}
    stops = entry.get("stop", list(stop))
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(string, str) for string in stops):
        raise ConfigError(f"stop is {stops!r}, which is neither a text nor a list of texts")
    request = TextRequest(entry["prompt"], dataclasses.replace(sampling, **changes), tuple(stops))
    check_request(request)
    return request


def _number(name: str, value: Any) -> Any:
    wanted = NUMBERS[name]
    fits = type(value) is int or (wanted is float and type(value) is float)
    if not fits:
        raise ConfigError(f"{name} is {value!r}, which is no {'whole ' if wanted is int else ''}number")
    return value


def _text(path: Path, flag: str) -> str:
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {flag} {path}: {error.strerror}") from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not text in UTF-8: byte {error.start} is {content[error.start]:#04x}"
        ) from error
