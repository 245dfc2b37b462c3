"""Decoding of models with full attention, whose states grow with the text: one sequence at a time, through their Hugging Face form.

Legend: B = 1 sequence, U vocabulary columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from based_megatron.convert.hf_files.modeling_based import CACHE_NAME, BasedForCausalLM
from based_megatron.inference.choice import GREEDY, Choice, Work
from based_megatron.inference.reader import Tokens


class AttentionLoop:
    """What `DecodingLoop` is for models with states, with one slot."""

    slots, steps_a_round, runs_ahead = 1, 1, False

    def __init__(self, model: BasedForCausalLM, vocab_size: int) -> None:
        """vocab_size: tokens that are chosen, the first ones."""
        self.model = model
        self.owner: object = None
        self.choice = Choice(1, vocab_size, model.device, "reference")
        self.token_B = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._cache: Any = None

    @property
    def state_bytes(self) -> None:
        """Unknown: it grows with the sequence."""
        return

    def begin(self, slots: Sequence[int], rows: Sequence[Tokens], drawn: Sequence[float], work: Work) -> list[int]:
        """Read the prompt of a new sequence, and choose its first token."""
        self._cache = None
        self._step(torch.tensor(rows, device=self.token_B.device), drawn[0], work)
        return self.token_B.tolist()

    def prepare(self, steps: int, work: Work = GREEDY) -> None:
        """Nothing has to be prepared."""

    def advance(self, steps: int, drawn: Sequence[Sequence[float]] = (), work: Work = GREEDY) -> Tensor:
        """The tokens after the newest one, [B, steps]."""
        found = []
        for i in range(steps):
            self._step(self.token_B[:, None], drawn[0][i] if drawn else 0.0, work)
            found.append(self.token_B.clone())
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def _step(self, ids: Tensor, drawn: float, work: Work) -> None:
        output: Any = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self._cache})
        self._cache = getattr(output, CACHE_NAME)
        uniform_B = torch.tensor([drawn], dtype=torch.float64, device=ids.device)
        self.choice.choose(output.logits[:, -1], uniform_B, self.token_B, work)
