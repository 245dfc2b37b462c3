"""Requests and answers of OpenAI's completions, as far as they are served: what is not is refused, never ignored."""

import dataclasses
import time
import uuid
from dataclasses import dataclass
from typing import Any

from based_megatron.errors import ConfigError
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.text import TextRequest, check_request

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None,),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
"""Parameters that are taken with these values only, which change nothing."""
NUMBERS = {"max_tokens": "max_new_tokens", "temperature": "", "top_p": "", "seed": "", "top_k": "", "min_p": ""}
NUMBERS |= {"repetition_penalty": ""}
"""Numbers of a request, and their names in `Sampling` where these differ. The last four are no part of OpenAI's interface."""
MOST_STOPS, LONGEST_STOP = 16, 256


@dataclass(frozen=True)
class Asked:
    """A request of completions."""

    requests: tuple[TextRequest, ...]
    """One for each prompt."""
    streams: bool
    counts_usage: bool
    """Whether a stream ends with an event of the tokens used."""


def read_completion(body: Any, served: str, most_new_tokens: int) -> Asked:
    """The request that a body asks for. Raises ConfigError, which names the parameter to change."""
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object")
    model = body.get("model", served)
    if model != served:
        raise ConfigError(f"the model {model!r} is not served here: set model to {served!r}")
    for name, values in NEUTRAL.items():
        if body.get(name) not in values:
            raise ConfigError(f"{name} is {_shown(body[name])}, which is not served: leave {name} out")
    known = {"model", "prompt", "stop", "stream", "stream_options", "user", *NEUTRAL, *NUMBERS}
    unknown = sorted(set(body) - known)
    if unknown:
        raise ConfigError(f"the parameter {_shown(unknown[0])} is unknown: leave it out")
    sampling, stop = _sampling(body, most_new_tokens), _stop(body.get("stop"))
    requests = tuple(TextRequest(prompt, sampling, stop) for prompt in _prompts(body.get("prompt")))
    for request in requests:
        check_request(request)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ConfigError(f"stream_options is {_shown(options)}, which is no object")
    return Asked(requests, _flag(body, "stream"), _flag(options, "include_usage"))


def _sampling(body: dict[str, Any], most_new_tokens: int) -> Sampling:
    hints = {field.name: field.type for field in dataclasses.fields(Sampling)}
    changes: dict[str, Any] = {"max_new_tokens": min(16, most_new_tokens), "seed": uuid.uuid4().int >> 65}
    for name, ours in NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        whole = hints[ours or name] is int or "int" in str(hints[ours or name])
        if type(value) is not int and (whole or type(value) is not float):
            raise ConfigError(f"{name} is {_shown(value)}, which is no {'whole ' if whole else ''}number")
        changes[ours or name] = value
    if changes["max_new_tokens"] > most_new_tokens:
        raise ConfigError(f"max_tokens is {changes['max_new_tokens']}, more than the {most_new_tokens} that are served")
    return Sampling(**changes)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """OpenAI takes a text, a list of texts, a list of tokens, or a list of such lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return list(value)
        if _are_tokens(value):
            return [tuple(value)]
        if all(isinstance(each, list) and each and _are_tokens(each) for each in value):
            return [tuple(each) for each in value]
    raise ConfigError(f"prompt is {_shown(value)}, which is neither a text, nor tokens, nor a list of them")


def _are_tokens(value: list[Any]) -> bool:
    return all(type(each) is int and each >= 0 for each in value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise ConfigError(f"stop is {_shown(value)}, which is neither a text nor a list of texts")
    if len(stops) > MOST_STOPS or any(len(each) > LONGEST_STOP for each in stops):
        raise ConfigError(f"stop has more than {MOST_STOPS} texts, or one of more than {LONGEST_STOP} characters")
    return tuple(stops)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise ConfigError(f"{name} is {_shown(value)}, which is neither true nor false")
    return bool(value)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Answer:
    """The parts of an answer to one request."""

    def __init__(self, model: str) -> None:
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def of(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """An answer, or an event of a stream."""
        return {**self.head, "choices": choices, **({} if usage is None else {"usage": usage})}


def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    """The text of one prompt, or a part of it."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens of a request."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def error(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
