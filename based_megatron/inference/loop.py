"""Decoding of a fixed number of sequences, in buffers that stay: on a GPU a step is a replay of a CUDA graph.

Legend: B slots, each for one sequence, S steps of the longest graph, L prompt tokens, N new tokens, U vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from based_megatron.inference.choice import GREEDY, Choice, Work
from based_megatron.inference.graphs import captured
from based_megatron.inference.prefix import PrefixStore
from based_megatron.inference.reader import Reader, Tokens

if TYPE_CHECKING:
    from based_megatron.inference.engine import Engine

STEPS_A_REPLAY = 16
"""Steps of a CUDA graph that a long run replays: between two graphs, and for a copy between them, a GPU rests."""
LONG_RUN_STEPS = 8 * STEPS_A_REPLAY
"""A graph of many steps takes as long to capture as some of its replays save: shorter runs do without."""


class DecodingLoop:
    """States, newest tokens and settings of B sequences, which all take part in every step; idle slots compute what nobody reads.

    So a row meets the same matrix products whoever else is there, and gives the same bits.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots, self.reader = engine, slots, Reader(engine)
        self.prefixes = PrefixStore()
        self.owner: object = None
        self.states = engine.model.zero_states(slots)
        self.token_B = torch.zeros_like(self.states.position_B)
        """The newest token of each sequence, not yet absorbed."""
        self.choice = Choice(slots, engine.vocab_size, self.token_B.device, engine.model.config.backend)
        self._uniform_BS = torch.zeros(slots, STEPS_A_REPLAY, dtype=torch.float64, device=self.token_B.device)
        self._newest_BS = self.token_B.new_zeros(slots, STEPS_A_REPLAY)
        """The tokens that the last replay has found."""
        self.runs_ahead = self.token_B.is_cuda
        self.steps_a_round = STEPS_A_REPLAY if self.token_B.is_cuda else 1
        self._uses_graphs = engine.graphs and self.token_B.is_cuda
        self._graphs: dict[tuple[Work, int], torch.cuda.CUDAGraph] = {}

    @property
    def state_bytes(self) -> int:
        """Memory that one sequence needs, whatever its length."""
        return self.states.bytes_per_sequence()

    def begin(self, slots: Sequence[int], rows: Sequence[Tokens], drawn: Sequence[float], work: Work) -> list[int]:
        """Read prompts into slots and choose their first tokens, by the settings that `choice` has for the slots."""
        logits_BU, states = self.prefixes.read(self.reader, rows)
        slot_B = self.reader.index(slots)
        self.states.put(slot_B, states)
        first_B = torch.empty_like(slot_B)
        uniform_B = torch.tensor(drawn, dtype=torch.float64, device=slot_B.device)
        self.choice.rows(slot_B).choose(logits_BU, uniform_B, first_B, work)
        if work.penalises:
            self.choice.seen()[slot_B, first_B] = True
        self.token_B.index_copy_(0, slot_B, first_B)
        return first_B.tolist()

    def start(self, prompt_BL: Tensor) -> None:
        """Begin sequences from prompts of one length, one for each slot, and choose their likeliest first tokens."""
        self.states.restart()
        logits_BU = self.engine.prefill(prompt_BL, self.states)[0]
        self.choice.choose(logits_BU, self._uniform_BS[:, 0], self.token_B, GREEDY)

    def prepare(self, steps: int, work: Work = GREEDY) -> None:
        """Capture what a run of so many steps replays. Sequences that are in the slots stay as they are."""
        if not self._uses_graphs:
            return
        for count in (1, STEPS_A_REPLAY)[: 1 if steps < LONG_RUN_STEPS else 2]:
            if (work, count) not in self._graphs:
                self._graphs[work, count] = self._captured(work, count)

    def advance(self, steps: int, drawn: Sequence[Sequence[float]] = (), work: Work = GREEDY) -> Tensor:
        """The tokens after the newest ones, [B, steps]. Does not wait for the device.

        drawn: for each row the numbers that it draws for them; empty where nothing is drawn.
        """
        self.prepare(1, work)
        uniform_BN = torch.tensor(drawn, dtype=torch.float64, device=self.token_B.device) if drawn else None
        found_BN = self.token_B.new_empty(self.slots, steps)
        place = 0
        while place < steps:
            count = STEPS_A_REPLAY if place + STEPS_A_REPLAY <= steps and (work, STEPS_A_REPLAY) in self._graphs else 1
            if uniform_BN is not None:
                self._uniform_BS[:, :count] = uniform_BN[:, place : place + count]
            if self._uses_graphs:
                self._graphs[work, count].replay()
            else:
                self._steps(work, count)
            found_BN[:, place : place + count] = self._newest_BS[:, :count]
            place += count
        return found_BN

    @torch.no_grad()
    def _steps(self, work: Work, count: int) -> None:
        """Absorb the newest tokens and choose the next ones, so many times."""
        for i in range(count):
            logits_BU = self.engine.decode_step(self.token_B, self.states)
            self.choice.choose(logits_BU, self._uniform_BS[:, i], self.token_B, work)
            self._newest_BS[:, i] = self.token_B

    def _captured(self, work: Work, count: int) -> torch.cuda.CUDAGraph:
        """A graph of so many steps. What the calls that warm it up do to the sequences is undone."""
        states, token_B = self.states.clone(), self.token_B.clone()
        seen_BU = self.choice.seen().clone() if work.penalises else None
        graph = captured(lambda: self._steps(work, count), warm_ups=2 if count == 1 else 0)
        self.states.copy_(states)
        self.token_B.copy_(token_B)
        if seen_BU is not None:
            self.choice.seen().copy_(seen_BU)
        return graph
