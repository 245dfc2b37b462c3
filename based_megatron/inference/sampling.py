"""The choice of the next token, as settings of `based generate`, of a request to `based serve` and of `Engine.generate`."""

from dataclasses import dataclass
from typing import Annotated

from based_megatron.config.limits import Range


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is chosen."""

    max_new_tokens: Annotated[int, Range(at_least=1)] = 64
    """Tokens to generate at most; an end-of-document token ends a text before."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 means all."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Sample from the fewest tokens that together have this probability."""
    min_p: Annotated[float, Range(at_least=0, at_most=1)] = 0.0
    """Sample from tokens that are at least so likely as this share of the likeliest one."""
    repetition_penalty: Annotated[float, Range(above=0)] = 1.0
    """Divides positive logits of tokens of the prompt and the text so far, and multiplies negative ones."""
    seed: int = 0
    """Seed of the sampling. What a request draws depends on its seed alone, not on the others of a batch."""


USUAL = Sampling()
"""The settings of a request that names none."""
