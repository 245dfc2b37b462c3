"""`based generate`: the texts of all requests on standard output, as they come; what was measured on standard error.

Legend: U vocabulary columns.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from based_megatron.errors import ConfigError
from based_megatron.inference.batching import Speed
from based_megatron.inference.loop import DecodingLoop
from based_megatron.inference.prefix import Prefix
from based_megatron.inference.text import TextDecoder, TextRequest, TextUpdate


class InOrder:
    """Writes texts one after the other, each as it comes; those of later requests wait."""

    def __init__(self, requests: Sequence[TextRequest], stream: TextIO) -> None:
        self.requests, self.stream = requests, stream
        self._next, self._texts, self._ended = 0, [""] * len(requests), [False] * len(requests)
        self._given = False

    def write(self, update: TextUpdate) -> None:
        """Take new text."""
        self._texts[update.request] += update.text
        self._ended[update.request] = update.finish is not None
        while self._next < len(self.requests):
            if not self._given:
                self.stream.write(str(self.requests[self._next].prompt))
                self._given = True
            self.stream.write(self._texts[self._next])
            self._texts[self._next] = ""
            if not self._ended[self._next]:
                break
            self.stream.write("\n\n")
            self._next, self._given = self._next + 1, False
        self.stream.flush()


class AsJson:
    """Writes a JSON line for each request that is finished: in the order of their ends, known by their place in the input."""

    def __init__(self, requests: Sequence[TextRequest], stream: TextIO) -> None:
        self.requests, self.stream = requests, stream
        self._texts, self._tokens = [""] * len(requests), [0] * len(requests)

    def write(self, update: TextUpdate) -> None:
        """Take new text."""
        place = update.request
        self._texts[place] += update.text
        self._tokens[place] += update.tokens
        if update.finish is None:
            return
        line = {
            "request": place,
            "prompt": self.requests[place].prompt,
            "text": self._texts[place],
            "tokens": self._tokens[place],
            "finish": update.finish,
        }
        self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.stream.flush()


def generate(
    decoder: TextDecoder, requests: Sequence[TextRequest], as_json: bool = False, *, rank: int = 0, ranks: int = 1
) -> None:
    """Continue all requests. The first of the ranks that share the model prints."""
    sink = (AsJson if as_json else InOrder)(requests, sys.stdout)
    for update in decoder.run(requests):
        if rank == 0:
            sink.write(update)
    if rank == 0:
        print(measured(decoder.batcher.speed, decoder.loop.state_bytes, ranks), file=sys.stderr)


def save_prefix(decoder: TextDecoder, request: TextRequest, path: Path) -> None:
    """Read a prompt and write its states, for prompts that start with it."""
    if not isinstance(decoder.loop, DecodingLoop):
        raise ConfigError("a model with full attention has no state of constant size: leave --save-prefix out")
    engine, tokens = decoder.loop.engine, decoder.encode(request.prompt)
    logits_1U, states = decoder.loop.reader.read([tokens])
    Prefix(tokens, logits_1U, states).save(path, engine.model)
    print(f"wrote the states of {len(tokens):,} tokens, {path.stat().st_size:,} bytes, to {path}", file=sys.stderr)


def measured(speed: Speed, state_bytes: int | None, ranks: int = 1) -> str:
    """What was measured, in one line. The first token of a text is counted to the reading of its prompt, which gives it."""
    read = _rate(speed.prompt_tokens, speed.read_seconds, "prompt tokens read")
    decoded = _rate(speed.decoded_tokens, speed.decode_seconds, "tokens decoded after the first of each text")
    state = "a state that grows with the text (full attention)"
    if state_bytes is not None:
        state = f"state {state_bytes:,} bytes a sequence{f' on each of {ranks} ranks' if ranks > 1 else ''}, whatever its length"
    return f"{read}; {decoded}; {state}"


def _rate(tokens: int, seconds: float, what: str) -> str:
    rate = f" ({tokens / seconds:,.1f} tokens/s)" if tokens else ""
    return f"{tokens:,} {what} in {seconds:.2f} s{rate}"
