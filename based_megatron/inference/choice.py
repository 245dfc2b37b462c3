"""The next tokens of a batch, each chosen by the settings of its own request.

A row draws one number in [0, 1) a token, out of a stream that its seed alone decides, and takes the token where the summed
probabilities, in the order of the vocabulary, pass it. So the other rows change neither what is drawn nor what it means.

Legend: B sequences, U vocabulary columns.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from based_megatron.inference.sampling import Sampling
from based_megatron.kernels.decode import choose_token


class Work(NamedTuple):
    """What the choice has to do for the requests of a batch: work that none of them asks for is left out."""

    samples: bool = False
    truncates: bool = False
    """Whether logits are sorted, for top_k and top_p."""
    penalises: bool = False

    @classmethod
    def of(cls, requests: Iterable[Sampling]) -> "Work":
        """The work that at least one request needs."""
        each = list(requests)
        return cls(
            samples=any(one.temperature > 0 for one in each),
            truncates=any(one.temperature > 0 and (one.top_k > 0 or one.top_p < 1) for one in each),
            penalises=any(one.repetition_penalty != 1 for one in each),
        )


GREEDY = Work()


class Choice:
    """Settings of B requests in buffers that stay, so that a CUDA graph can hold the choice."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device, backend: str) -> None:
        self.vocab_size, self.backend = vocab_size, backend
        numbers_B = torch.zeros(batch, device=device)
        self.is_greedy_B = torch.ones(batch, dtype=torch.bool, device=device)
        self.temperature_B, self.top_p_B, self.penalty_B = (torch.ones_like(numbers_B) for _ in range(3))
        self.least_log_p_B = torch.full_like(numbers_B, -torch.inf)
        """log(min_p)."""
        self.top_k_B = torch.full((batch,), vocab_size, device=device)
        self._seen_BU: Tensor | None = None

    def seen(self) -> Tensor:
        """[B, U], whether a token stands in the prompt or the text of each request; made when a request first penalises that."""
        if self._seen_BU is None:
            shape = len(self.top_k_B), self.vocab_size
            self._seen_BU = torch.zeros(shape, dtype=torch.bool, device=self.top_k_B.device)
        return self._seen_BU

    def set_row(self, row: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Give a row to a request."""
        self.is_greedy_B[row] = sampling.temperature == 0
        self.temperature_B[row] = sampling.temperature or 1.0
        self.top_k_B[row] = min(sampling.top_k or self.vocab_size, self.vocab_size)
        self.top_p_B[row], self.penalty_B[row] = sampling.top_p, sampling.repetition_penalty
        self.least_log_p_B[row] = float(np.log(sampling.min_p)) if sampling.min_p else -torch.inf
        if sampling.repetition_penalty != 1:
            self.seen()[row] = False
            self.seen()[row, torch.tensor(prompt, device=self.seen().device)] = True

    def rows(self, row_B: Tensor) -> "Choice":
        """A copy of the settings of some rows."""
        some = Choice(len(row_B), self.vocab_size, row_B.device, self.backend)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(some, name, x.index_select(0, row_B))
        return some

    def choose(self, logits_BU: Tensor, uniform_B: Tensor, token_B: Tensor, work: Work) -> None:
        """Put the next token of each row into token_B. Columns from vocab_size on are no tokens. Never waits for the host.

        uniform_B: what each row draws, fp64; not read by greedy rows.
        """
        if work == GREEDY:
            choose_token(logits_BU, self.vocab_size, token_B, backend=self.backend)
            return
        logits_BU = logits_BU[:, : self.vocab_size]
        logits_BU = logits_BU.to(torch.promote_types(logits_BU.dtype, torch.float32))
        if work.penalises:
            penalty_B1 = self.penalty_B[:, None]
            penalised_BU = torch.where(logits_BU > 0, logits_BU / penalty_B1, logits_BU * penalty_B1)
            logits_BU = torch.where(self.seen(), penalised_BU, logits_BU)
        choose_token(logits_BU, self.vocab_size, token_B, backend=self.backend)
        if work.samples:
            drawn_B = self._drawn(logits_BU, uniform_B, work.truncates)
            token_B.copy_(torch.where(self.is_greedy_B, token_B, drawn_B))
        if work.penalises:
            self.seen().scatter_(1, token_B[:, None], True)

    def _drawn(self, logits_BU: Tensor, uniform_B: Tensor, truncates: bool) -> Tensor:
        # Less the largest, before a small temperature can make it infinite.
        scaled_BU = (logits_BU - logits_BU.amax(-1, keepdim=True)) / self.temperature_B[:, None]
        least_B = self.least_log_p_B
        if truncates:
            least_B = torch.maximum(least_B, self._truncated(scaled_BU))
        p_BU = scaled_BU.masked_fill(scaled_BU < least_B[:, None], -torch.inf).double().exp()
        sums_BU = p_BU.cumsum(-1)
        total_B1 = sums_BU[:, -1:]
        # Below the total, which only the last possible token reaches.
        aim_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
        return torch.searchsorted(sums_BU, aim_B1, right=True)[:, 0].clamp_max(self.vocab_size - 1)

    def _truncated(self, scaled_BU: Tensor) -> Tensor:
        """The smallest scaled logit that top_k and top_p leave, [B]; tokens that have equal ones stay together."""
        sorted_BU = scaled_BU.sort(-1, descending=True).values
        rank_U = torch.arange(self.vocab_size, device=scaled_BU.device)
        p_BU = sorted_BU.masked_fill(rank_U >= self.top_k_B[:, None], -torch.inf).softmax(-1)
        # A token stays if those before it have less than top_p: the likeliest always does.
        needed_BU = p_BU.cumsum(-1) - p_BU < self.top_p_B[:, None]
        kept_B = torch.where(self.top_p_B < 1, needed_BU.sum(-1), self.vocab_size).minimum(self.top_k_B)
        # Of logits that are not numbers none is kept.
        return sorted_BU.gather(-1, kept_B[:, None].clamp_min(1) - 1)[:, 0]


def stream_of(seed: int) -> np.random.Generator:
    """The numbers that a request draws, one a token."""
    return np.random.Generator(np.random.Philox(seed))
