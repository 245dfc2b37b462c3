"""Prefill and decoding of the training model on one device, with states of constant size.

On a GPU, `GreedyLoop` and `PromptGraph` replay CUDA graphs: a step of decoding, or a short prompt, is some hundreds of
kernels that take less time than their launches.

Legend: B sequences, L prompt tokens, N new tokens, U vocabulary columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from based_megatron.errors import ConfigError
from based_megatron.kernels.decode import choose_token
from based_megatron.model.based_model import BasedModel
from based_megatron.model.states import ModelStates


class Engine:
    """Continues batches of prompts of one length."""

    def __init__(self, model: BasedModel, piece_tokens: int | None = None) -> None:
        """piece_tokens: most tokens of a prompt that are computed at once, so that memory does not grow with prompts.

        Raises ConfigError for a model that is cut over ranks, and for one with full attention, which has no such state.
        """
        if model.group.size() > 1 or not (model.pre_process and model.post_process):
            raise ConfigError(
                "decoding needs the whole model on one rank: set parallel.tensor=1 and parallel.pipeline=1"
            )
        if piece_tokens is not None and piece_tokens < 1:
            raise ConfigError(f"piece_tokens is {piece_tokens}: a prompt is computed in pieces of at least one token")
        prefix_tokens = model.config.model.prefix_tokens
        if piece_tokens is not None and piece_tokens < prefix_tokens:
            raise ConfigError(
                f"piece_tokens is {piece_tokens}, but all tokens of a prompt see the first {prefix_tokens} (model.prefix_tokens): a "
                f"piece must hold them"
            )
        model.zero_states(0)
        self.model, self.piece_tokens = model, piece_tokens
        self._last_loop: GreedyLoop | None = None

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

    def generate(self, prompt_BL: Tensor, new_tokens: int) -> Tensor:
        """The most likely next token, N times: [B, N]."""
        loop = self.loop(len(prompt_BL))
        loop.start(prompt_BL)
        return loop.run(new_tokens)

    def loop(self, batch: int) -> "GreedyLoop":
        """The decoding loop of a batch size; the last one is kept, with its states and graph."""
        if self._last_loop is None or self._last_loop.batch != batch:
            self._last_loop = None
            self._last_loop = GreedyLoop(self, batch)
        return self._last_loop


STEPS_A_REPLAY = 16
"""Steps of a CUDA graph that a long run replays: between two graphs, and for a copy between them, a GPU rests."""


class GreedyLoop:
    """Greedy decoding of one batch size over buffers that stay; on a GPU steps are replays of CUDA graphs."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine, self.batch = engine, batch
        self.states = engine.model.zero_states(batch)
        self.token_B = torch.zeros_like(self.states.position_B)
        """The newest token of each sequence, not yet absorbed."""
        self._newest_BS = self.token_B.new_empty(batch, STEPS_A_REPLAY)
        """The tokens that a replay of so many steps has found."""
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.token_B.is_cuda:
            # What the warm-up leaves in the states is cleared by `start`.
            self._graph, self._long_graph = _captured(self._step), _captured(self._steps, warm_ups=0)

    def start(self, prompt_BL: Tensor) -> None:
        """Begin new sequences and choose their first token."""
        self.states.restart()
        self._choose(self.engine.prefill(prompt_BL, self.states)[0])

    def resume(self, logits_BU: Tensor, states: ModelStates) -> None:
        """Go on with sequences that another batch of this size has absorbed: a copy of its states, and its last logits."""
        self.states.copy_(states)
        self._choose(logits_BU)

    def run(self, tokens: int) -> Tensor:
        """The newest token and the `tokens` - 1 that follow it, [B, tokens]. Does not wait for the device."""
        found_BN = self.token_B.new_empty(self.batch, tokens)
        found_BN[:, :1] = self.token_B[:, None]
        place = 1
        while self._graph is not None and place + STEPS_A_REPLAY <= tokens:
            self._long_graph.replay()
            found_BN[:, place : place + STEPS_A_REPLAY] = self._newest_BS
            place += STEPS_A_REPLAY
        for i in range(place, tokens):
            self.step()
            found_BN[:, i] = self.token_B
        return found_BN

    def step(self) -> None:
        """Absorb the newest token and choose the next."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    @torch.no_grad()
    def _step(self) -> None:
        self._choose(self.engine.decode_step(self.token_B, self.states))

    def _steps(self) -> None:
        for i in range(STEPS_A_REPLAY):
            self._step()
            self._newest_BS[:, i] = self.token_B

    def _choose(self, logits_BU: Tensor) -> None:
        # Rows that only round the vocabulary up are no tokens.
        config = self.engine.model.config
        choose_token(logits_BU, config.model.vocab_size, self.token_B, backend=config.backend)


class PromptGraph:
    """New sequences from prompts of one shape, [B, L]: one replay of a CUDA graph on a GPU."""

    def __init__(self, engine: Engine, batch: int, tokens: int) -> None:
        self.engine = engine
        self.states = engine.model.zero_states(batch)
        self.tokens_BL = torch.zeros(batch, tokens, dtype=torch.int64, device=self.states.position_B.device)
        self._graph = _captured(self._prefill) if self.tokens_BL.is_cuda else None

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


def _captured(call: Callable[[], None], warm_ups: int = 2) -> torch.cuda.CUDAGraph:
    """A graph of what `call` launches, after calls that compile kernels and allocate what they keep."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of a process group may look at the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph
