"""Prefill and decoding of the training model on one device, with states of constant size.

Legend: B sequences, L prompt tokens, U vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from based_megatron.errors import ConfigError
from based_megatron.inference.batching import Batcher, Request, Update
from based_megatron.inference.graphs import captured
from based_megatron.inference.loop import DecodingLoop
from based_megatron.model.based_model import BasedModel
from based_megatron.model.states import ModelStates


class Engine:
    """The one decoder: continues prompts of any lengths, in as many sequences at once as there are slots."""

    def __init__(
        self,
        model: BasedModel,
        piece_tokens: int | None = None,
        *,
        vocab_size: int | None = None,
        graphs: bool = True,
    ) -> None:
        """piece_tokens: most tokens of a prompt that are computed at once, so that memory does not grow with prompts.
        vocab_size: tokens that are chosen, the first ones, where the tokenizer has fewer than the model.
        graphs: whether steps are CUDA graphs on a GPU, which takes seconds and memory before the first.

        Tensor parallel ranks make the same calls, and find the same tokens.
        Raises ConfigError for a model whose layers are on several ranks, and for one with full attention, which has no such state.
        """
        if not (model.pre_process and model.post_process):
            raise ConfigError("decoding needs all layers on each rank: set parallel.pipeline=1")
        if model.group.size() > 1 and model.config.sequence_parallel:
            raise ConfigError("decoding has no sequence to share norms over: set parallel.sequence_parallel=false")
        if piece_tokens is not None and piece_tokens < 1:
            raise ConfigError(f"piece_tokens is {piece_tokens}: a prompt is computed in pieces of at least one token")
        prefix_tokens = model.config.model.prefix_tokens
        if piece_tokens is not None and piece_tokens < prefix_tokens:
            raise ConfigError(
                f"piece_tokens is {piece_tokens}, but all tokens of a prompt see the first {prefix_tokens} (model.prefix_tokens): a "
                f"piece must hold them"
            )
        model.zero_states(0)
        self.model, self.piece_tokens, self.graphs = model, piece_tokens, graphs
        self.vocab_size = vocab_size or model.config.model.vocab_size
        self._last_loop: DecodingLoop | None = None

    @torch.no_grad()
    def prefill(self, tokens_BL: Tensor, states: ModelStates | None = None) -> tuple[Tensor, ModelStates]:
        """Append the prompts to the sequences of `states`, which is updated in place; None starts new sequences.

        Returns: logits [B, U] of the last token, and the states.
        """
        if tokens_BL.shape[1] == 0:
            raise ConfigError("a prompt is empty: decoding starts from at least one token")
        states = self.model.zero_states(len(tokens_BL)) if states is None else states
        for piece_BL in tokens_BL.split(self.piece_tokens or tokens_BL.shape[1], dim=1):
            logits_BU = self.model.decode(piece_BL, states)
        return logits_BU, states

    @torch.no_grad()
    def decode_step(self, token_B: Tensor, states: ModelStates) -> Tensor:
        """Append one token to each sequence. Returns its logits [B, U]; the states are updated in place."""
        return self.model.decode(token_B, states)

    def generate(
        self, requests: Iterable[Request], slots: int, eos_id: int | None = None, reproducible: bool = False
    ) -> Iterator[Update]:
        """Tokens of the requests as they come; a request is known by its place among them, from 0.

        Requests are taken as slots become free: there may be any number of them. eos_id and reproducible: see `Batcher`.
        """
        yield from Batcher(self.loop(slots), eos_id, reproducible).run(requests)

    def loop(self, slots: int) -> DecodingLoop:
        """The decoding loop of so many sequences; the last one is kept, with its states and graphs."""
        if self._last_loop is None or self._last_loop.slots != slots:
            self._last_loop = None
            self._last_loop = DecodingLoop(self, slots)
        return self._last_loop


class PromptGraph:
    """New sequences from prompts of one shape, [B, L]: one replay of a CUDA graph on a GPU."""

    def __init__(self, engine: Engine, batch: int, tokens: int) -> None:
        self.engine = engine
        self.states = engine.model.zero_states(batch)
        self.tokens_BL = torch.zeros(batch, tokens, dtype=torch.int64, device=self.states.position_B.device)
        self._graph = captured(self._prefill) if self.tokens_BL.is_cuda else None

    def run(self, tokens_BL: Tensor) -> tuple[Tensor, ModelStates]:
        """Logits [B, U] of the last token, and the states: buffers that the next run overwrites."""
        if tokens_BL.shape != self.tokens_BL.shape:
            raise ConfigError(f"prompts are {list(tokens_BL.shape)}: this graph is of {list(self.tokens_BL.shape)}")
        self.tokens_BL.copy_(tokens_BL)
        if self._graph is None:
            self._prefill()
        else:
            self._graph.replay()
        self.states.is_start = False
        return self._logits_BU, self.states

    def _prefill(self) -> None:
        self.states.restart()
        self._logits_BU = self.engine.prefill(self.tokens_BL, self.states)[0]
