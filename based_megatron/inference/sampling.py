"""The choice of the next token, as settings of `based generate`."""

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
    seed: int = 0
    """Seed of the sampling."""
