"""The fingerprint of a run's data: a string of everything that decides which sequence a number means.

    A*4+B*1@1000=A*1+B*1/seed=42/cross_blocks/sequence_length_tokens=2048

Corpora by the fingerprints of their manifests, with their shares; after each @ those from a sequence on; then the settings of the order.
"""

import re
from collections.abc import Sequence

from based_megatron.data.mixture import Mixture

CORPUS = r"(?P<corpus>[0-9a-f]{32})\*(?P<weight>\d[\d.e+-]*?)(?=\+[0-9a-f]{32}\*|$)"


def corpora_text(fingerprints: Sequence[str], phases: Sequence[tuple[int, Sequence[int]]]) -> str:
    """The first part of a fingerprint. phases: (first sequence, share of each corpus), ascending from 0."""
    texts = [
        "+".join(f"{corpus}*{share}" for corpus, share in zip(fingerprints, shares, strict=True) if share)
        for _, shares in phases
    ]
    return "@".join([texts[0], *(f"{start}={text}" for (start, _), text in zip(phases[1:], texts[1:], strict=True))])


def corpora_before(fingerprint: str, sequences: int, weights: Sequence[float] = ()) -> str:
    """What a fingerprint says of the corpora of the first `sequences` of a run.

    weights: of its sources, where they are known. Older fingerprints have weights of six digits in the place of shares.
    """
    first, *later = fingerprint.partition("/")[0].split("@")
    return "@".join(
        [_with_shares(first, weights), *(text for text in later if int(text.partition("=")[0]) < sequences)]
    )


def _with_shares(text: str, weights: Sequence[float]) -> str:
    found = [(match["corpus"], float(match["weight"])) for match in re.finditer(CORPUS, text)]
    if not found:
        return text
    corpora, rounded = zip(*found, strict=True)
    return corpora_text(corpora, [(0, Mixture(weights if len(weights) == len(rounded) else rounded).shares)])
