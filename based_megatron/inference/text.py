"""Text in, text out: prompts are tokenized, and the text of new tokens is given out as soon as it is certain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from based_megatron.config.limits import check_limits, flag
from based_megatron.errors import ConfigError
from based_megatron.inference.batching import Batcher, Finish, Loop, Request, Update
from based_megatron.inference.reader import Tokens
from based_megatron.inference.sampling import USUAL, Sampling


@dataclass(frozen=True)
class TextRequest:
    """A prompt, and how it is continued."""

    prompt: str | Tokens
    sampling: Sampling = USUAL
    stop: tuple[str, ...] = ()
    """Strings before the first of which the text is cut off; none is part of it."""


@dataclass(frozen=True)
class TextUpdate:
    """New text of a request."""

    request: int
    """Its number."""
    text: str
    """May be empty: of a character whose bytes are not complete, or the start of a stop string."""
    tokens: int
    finish: Finish | None
    """Why it has ended, if it has."""


@dataclass(frozen=True)
class Completion:
    """The whole continuation of a prompt."""

    text: str
    tokens: int
    """Generated, the end of the document left out."""
    finish: Finish


class TextStream:
    """The text of tokens that come one by one, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [string for string in stop if string]
        self._stream = DecodeStream(skip_special_tokens=False)
        self._tokens: list[int] = []
        self._text, self._given, self._is_cut = "", 0, False

    def push(self, token: int) -> bool:
        """Take a token; whether the text has reached a stop string."""
        self._tokens.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except (
            Exception
        ):  # tokenizers raises a bare Exception where text changes with what follows: `close` has all of it
            piece = None
        self._add(piece or "")
        return self._is_cut

    def take(self) -> str:
        """New text, without an end that may become a stop string."""
        held = 0 if self._is_cut else max((_overlap(self._text, string) for string in self._stop), default=0)
        return self._give(len(self._text) - held)

    def close(self) -> str:
        """The rest of the text, after the last token. Bytes that are no character are U+FFFD."""
        if not self._is_cut:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
            self._add(whole[len(self._text) :])
        return self._give(len(self._text))

    def _add(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        ends = [self._text.find(string, max(0, before - len(string) + 1)) for string in self._stop]
        found = [end for end in ends if end >= 0]
        if found:
            self._text, self._is_cut = self._text[: min(found)], True

    def _give(self, end: int) -> str:
        start, self._given = self._given, max(end, self._given)
        return self._text[start:end]


class TextDecoder:
    """Continues prompts over the slots of a loop. One thread at a time may call it."""

    def __init__(self, loop: Loop, tokenizer: PreTrainedTokenizerFast, reproducible: bool = False) -> None:
        """reproducible: see `Batcher`."""
        self.loop, self.tokenizer = loop, tokenizer
        self.batcher = Batcher(loop, tokenizer.eos_token_id, reproducible)
        self._streams: dict[int, TextStream] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.loop.choice.top_k_B.device

    def encode(self, prompt: str | Tokens) -> Tokens:
        """Tokens of a prompt; any thread may call it. Raises ConfigError if there are none, and for numbers that are no tokens."""
        if isinstance(prompt, str):
            encoding = self.tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False)
            prompt = tuple(encoding.ids)
        if not prompt:
            raise ConfigError("a prompt has no tokens in this tokenizer: change it")
        if max(prompt) >= self.loop.choice.vocab_size:
            raise ConfigError(
                f"token {max(prompt)} of a prompt is none of the {self.loop.choice.vocab_size} of the model"
            )
        return prompt

    def add(self, request: TextRequest) -> int:
        """Queue a request; returns its number."""
        return self.batcher.add(self._tokenized(request))

    def cancel(self, number: int) -> None:
        """End a request; there are no more updates of it."""
        self.batcher.cancel(number)
        self._streams.pop(number, None)

    def step(self) -> list[TextUpdate]:
        """Decode one round; the new text of all requests that have a slot."""
        return [self._text(update) for update in self.batcher.step()]

    def run(self, requests: Iterable[TextRequest]) -> Iterator[TextUpdate]:
        """Updates of requests, which are taken as slots become free and numbered in this order from 0."""
        for update in self.batcher.run(self._tokenized(request) for request in requests):
            yield self._text(update)

    def complete(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """All continuations, in the order of the requests, by a decoder that has had none yet."""
        texts, tokens = [""] * len(requests), [0] * len(requests)
        ends: list[Finish] = ["length"] * len(requests)
        for update in self.run(requests):
            texts[update.request] += update.text
            tokens[update.request] += update.tokens
            ends[update.request] = update.finish or "length"
        return [Completion(*each) for each in zip(texts, tokens, ends, strict=True)]

    def _tokenized(self, request: TextRequest) -> Request:
        """The next request of the batcher."""
        tokens, stream = self.encode(request.prompt), TextStream(self.tokenizer.backend_tokenizer, request.stop)
        self._streams[self.batcher.next_number] = stream
        return Request(tokens, request.sampling, stream.push)

    def _text(self, update: Update) -> TextUpdate:
        stream = self._streams[update.request]
        text = stream.take() if update.finish is None else stream.close()
        if update.finish is not None:
            del self._streams[update.request]
        return TextUpdate(update.request, text, len(update.tokens), update.finish)


def check_request(request: TextRequest) -> None:
    """Raise ConfigError for an empty prompt, one that is not text, or impossible sampling values."""
    check_limits(request.sampling, flag)
    if not request.prompt:
        raise ConfigError("a prompt is empty: give --prompt some text to continue")
    for flag_name, text in (("--prompt", request.prompt), *(("--stop", string) for string in request.stop)):
        if isinstance(text, str):
            check_text(flag_name, text)


def check_text(name: str, text: str) -> None:
    """Raise ConfigError for a string with characters that no UTF-8 can have come from, such as undecodable bytes of an argument."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} {ascii(text)[:60]} is not text in UTF-8 ({error.reason}); change {name}") from error


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text that are the start of a string, and not all of it."""
    sizes = range(min(len(text), len(string) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(string[:size])), 0)
