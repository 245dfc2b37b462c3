"""Scores of continuations out of a model's logits, in one way for all that reads rows.

Legend: U vocabulary columns.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, in nats."""

    log_likelihood: float
    is_greedy: bool
    """Whether greedy decoding would have written it."""


def likelihoods(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, fp64, and whether it is the likeliest token.

    logits: [..., U], whose columns all take part in the softmax; those from vocab_size on are no tokens. targets: [...].
    """
    wide = logits.double()
    log_p = wide.gather(-1, targets[..., None])[..., 0] - wide.logsumexp(-1)
    return log_p, logits[..., :vocab_size].argmax(-1) == targets
