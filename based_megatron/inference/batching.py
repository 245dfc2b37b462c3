"""Continuous batching: a queue of requests keeps the slots of a decoding loop full, and a slot that is free is given away at once.

Legend: B slots, N new tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from based_megatron.inference.choice import GREEDY, Choice, Work, stream_of
from based_megatron.inference.reader import Tokens
from based_megatron.inference.sampling import USUAL, Sampling
from based_megatron.parallel.transfer import HostCopy

READ_TOKENS = 16_384
"""Tokens of prompts that are read between two rounds of decoding, a longer prompt excepted: others wait meanwhile."""
Finish = Literal["stop", "length"]


class Loop(Protocol):
    """What decodes: `DecodingLoop`, or `AttentionLoop` for models with full attention."""

    slots: int
    choice: Choice
    owner: object
    """The batcher that uses the slots."""
    steps_a_round: int
    """Steps between two looks at the tokens: a GPU would wait for the host at each."""
    runs_ahead: bool
    """Whether a round is begun before the tokens of the last one are looked at, so that a GPU does not wait for that."""

    @property
    def state_bytes(self) -> int | None:
        """Memory of one sequence; None if it grows."""

    def begin(self, slots: Sequence[int], rows: Sequence[Tokens], drawn: Sequence[float], work: Work) -> list[int]: ...

    def prepare(self, steps: int, work: Work = GREEDY) -> None: ...

    def advance(self, steps: int, drawn: Sequence[Sequence[float]] = (), work: Work = GREEDY) -> Tensor: ...


def never(token: int) -> bool:
    """Ends no text."""
    return False


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and how it is continued."""

    prompt: Tokens
    sampling: Sampling = USUAL
    ended: Callable[[int], bool] = never
    """Told each new token once, in order: whether the text ends with it."""


@dataclass(frozen=True)
class Update:
    """New tokens of a request."""

    request: int
    """Its number."""
    tokens: Tokens
    """Without the token that ends a document."""
    finish: Finish | None
    """Why it has ended, if it has: `stop` at the end of a document or by `ended`, `length` at max_new_tokens."""


@dataclass
class Speed:
    """Tokens and seconds of reading prompts and of decoding, apart."""

    prompt_tokens: int = 0
    read_seconds: float = 0.0
    first_tokens: int = 0
    """Requests whose prompt has been read: that gives their first token too."""
    decoded_tokens: int = 0
    """Tokens that requests got, the first of each left out."""
    decode_seconds: float = 0.0


@dataclass
class _Running:
    number: int
    request: Request
    numbers: np.random.Generator
    tokens: int = 0
    """Looked at so far."""
    chosen: int = 1
    """Rounds that are under way included."""

    @property
    def left(self) -> int:
        """Tokens that may still be chosen."""
        return self.request.sampling.max_new_tokens - self.chosen

    def draw(self, count: int) -> list[float]:
        if not self.request.sampling.temperature:
            return [0.0] * count
        return self.numbers.random(count).tolist()

    def take(self, tokens: Sequence[int], eos_id: int | None) -> Update:
        """The update of tokens that were chosen, up to where the text ends."""
        new: list[int] = []
        finish: Finish | None = None
        for token in tokens:
            if token == eos_id:
                finish = "stop"
                break
            new.append(token)
            self.tokens += 1
            if self.request.ended(token):
                finish = "stop"
                break
            if self.tokens == self.request.sampling.max_new_tokens:
                finish = "length"
                break
        return Update(self.number, tuple(new), finish)


@dataclass(frozen=True)
class _Round:
    """Some steps of decoding that have been begun."""

    running: dict[int, _Running]
    """Who had the slots."""
    found: HostCopy


class Batcher:
    """Requests over the slots of a loop."""

    def __init__(self, loop: Loop, eos_id: int | None = None, reproducible: bool = False) -> None:
        """Take over the loop: a batcher that had it before cannot go on.

        eos_id: the token that ends a document, and a text; None if none does.
        reproducible: read each prompt alone, so that a request gets the same bits whatever else there is; short prompts take longer.
        """
        self.loop, self.eos_id, self.reproducible, self.speed = loop, eos_id, reproducible, Speed()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        """By slot."""
        self._under_way: _Round | None = None
        self._counted_until = 0.0
        """Time up to which seconds are counted."""
        self.next_number = 0
        loop.owner = self

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether one more request would get a slot at once."""
        return self.running + self.waiting < self.loop.slots

    @property
    def is_busy(self) -> bool:
        """Whether a request is not finished."""
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request. Returns its number: 0, 1, 2, .. in this order."""
        number, self.next_number = self.next_number, self.next_number + 1
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """End a request; there are no more updates of it. One that has ended already is no error."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        self._running = {slot: one for slot, one in self._running.items() if one.number != number}

    def run(self, requests: Iterable[Request]) -> Iterator[Update]:
        """Updates of the requests, which are taken as slots become free."""
        source = iter(requests)
        is_more = True
        while True:
            while is_more and self.has_room:
                request = next(source, None)
                is_more = request is not None
                if request is not None:
                    self.add(request)
            if not self.is_busy:
                return
            yield from self.step()

    def step(self) -> list[Update]:
        """Fill free slots, and decode one round: one step, or a few on a GPU."""
        if self.loop.owner is not self:
            raise RuntimeError("the slots of this batcher were given to another one, which was made later")
        before = self.speed.read_seconds
        if self._under_way is None:
            self._counted_until = time.perf_counter()
        updates = self._fill()
        done, self._under_way = self._under_way, self._launch()
        if not self.loop.runs_ahead:
            done, self._under_way = self._under_way, None
        if done is not None:
            updates += self._collect(done)
        now = time.perf_counter()
        self.speed.decode_seconds += now - self._counted_until - (self.speed.read_seconds - before)
        self._counted_until = now
        return updates

    def _fill(self) -> list[Update]:
        updates: list[Update] = []
        tokens = 0
        while self._waiting and len(self._running) < self.loop.slots and tokens < READ_TOKENS:
            group = self._group(READ_TOKENS - tokens)
            tokens += sum(len(request.prompt) for _, request in group)
            updates += self._begin(group)
        return updates

    def _group(self, room: int) -> list[tuple[int, Request]]:
        """The next requests that are read together: at least one."""
        most = 1 if self.reproducible else self.loop.slots - len(self._running)
        group = [self._waiting.popleft()]
        room -= len(group[0][1].prompt)
        while self._waiting and len(group) < most and len(self._waiting[0][1].prompt) <= room:
            group.append(self._waiting.popleft())
            room -= len(group[-1][1].prompt)
        return group

    def _begin(self, group: Sequence[tuple[int, Request]]) -> list[Update]:
        free = [slot for slot in range(self.loop.slots) if slot not in self._running]
        entries = [_Running(number, request, stream_of(request.sampling.seed)) for number, request in group]
        slots = free[: len(entries)]
        for slot, entry in zip(slots, entries, strict=True):
            self.loop.choice.set_row(slot, entry.request.sampling, entry.request.prompt)
        work = Work.of(entry.request.sampling for entry in entries)
        start = time.perf_counter()
        drawn = [entry.draw(1)[0] for entry in entries]
        first = self.loop.begin(slots, [entry.request.prompt for entry in entries], drawn, work)
        self.speed.read_seconds += time.perf_counter() - start
        self.speed.prompt_tokens += sum(len(request.prompt) for _, request in group)
        self.speed.first_tokens += len(group)
        self._running |= zip(slots, entries, strict=True)
        self.loop.prepare(max(entry.request.sampling.max_new_tokens for entry in entries), self._work())
        return [self._take(slot, [token]) for slot, token in zip(slots, first, strict=True)]

    def _launch(self) -> _Round | None:
        """Begin a round for all that want more tokens, if any do."""
        steps = min(self.loop.steps_a_round, max((one.left for one in self._running.values()), default=0))
        if steps < 1:
            return None
        work, idle = self._work(), [0.0] * steps
        slots = range(self.loop.slots)
        drawn = [self._running[slot].draw(steps) if slot in self._running else idle for slot in slots]
        found_BN = self.loop.advance(steps, drawn if work.samples else (), work)
        for one in self._running.values():
            one.chosen += steps
        return _Round(dict(self._running), HostCopy(found_BN))

    def _collect(self, done: _Round) -> list[Update]:
        """The tokens of a round, for those that have not ended meanwhile."""
        found = done.found.wait_for_list()
        updates = [
            self._take(slot, found[slot]) for slot, one in done.running.items() if self._running.get(slot) is one
        ]
        self.speed.decoded_tokens += sum(len(update.tokens) for update in updates)
        return updates

    def _take(self, slot: int, tokens: Sequence[int]) -> Update:
        update = self._running[slot].take(tokens, self.eos_id)
        if update.finish is not None:
            del self._running[slot]
        return update

    def _work(self) -> Work:
        return Work.of(one.request.sampling for one in self._running.values())
