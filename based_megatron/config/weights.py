"""The syntax of changing weights: words TOKENS=WEIGHT,WEIGHT,... with a weight for each source of a mixture."""

import math
import re
from dataclasses import dataclass

from based_megatron.config.schema import DataConfig
from based_megatron.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kMBT]?)")


@dataclass(frozen=True)
class Weights:
    """The weights of the sources of a mixture, from a token on."""

    tokens: int
    """Tokens of the run before they are in force."""
    weights: tuple[float, ...]
    """One for each source; some are above 0."""


def weights_of(data: DataConfig) -> list[Weights]:
    """The weights of a run, ascending from token 0. Raises ConfigError for words that are none, and a source that is never read."""
    if not data.sources:
        if data.schedule:
            raise ConfigError(
                "data.schedule has weights of data.sources, of which there are none; change data.schedule"
            )
        return [Weights(0, (1.0,))]
    found = [Weights(0, _checked(tuple(source.weight for source in data.sources), "data.sources"))]
    for word in data.schedule:
        entry = _parsed(word, len(data.sources))
        if entry.tokens <= found[-1].tokens:
            raise ConfigError(
                f"data.schedule has {word!r} after {found[-1].tokens} tokens; change data.schedule to ascending tokens above 0"
            )
        found.append(entry)
    for index in range(len(data.sources)):
        if not any(entry.weights[index] for entry in found):
            raise ConfigError(
                f"data.sources[{index}].weight is {data.sources[index].weight}, and data.schedule never raises it above 0; "
                f"leave the source out or raise its weight"
            )
    return found


def _parsed(word: str, sources: int) -> Weights:
    tokens, _, weights = word.partition("=")
    match = TOKENS.fullmatch(tokens.strip())
    try:
        numbers = tuple(float(weight) for weight in weights.split(","))
    except ValueError:
        numbers = ()
    if match is None or len(numbers) != sources:
        raise ConfigError(
            f"data.schedule has {word!r:.80}, not TOKENS=WEIGHT,... with a weight for each of {sources} data.sources, such as "
            f"300B={','.join(['1'] * sources)}; change data.schedule"
        )
    # A whole number may have more digits than a float.
    number = int(match[1]) if match[1].isdecimal() else float(match[1])
    return Weights(round(number * UNITS[match[2]]), _checked(numbers, f"data.schedule {word!r:.80}"))


def _checked(weights: tuple[float, ...], key: str) -> tuple[float, ...]:
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(
            f"the weights of {key} are {', '.join(map(str, weights))}, but must be finite, at least 0, and some above it; change {key}"
        )
    return weights
