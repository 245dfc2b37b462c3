"""The syntax of the layer pattern: a short string with a letter for the mixer of each layer."""

import re

from based_megatron.errors import ConfigError

MOST_LAYERS = 10_000
SLICE = re.compile(r"(-?\d{1,5})?:(-?\d{1,5})?")


def parse_layer_pattern(pattern: str) -> str:
    """Expand a layer pattern to one letter per layer: `cLS*2 cc` -> `cLScLScc`. Which mixer a letter is, the model knows.

    Raises ConfigError for an empty pattern, a group that is not letters and a count, and more than MOST_LAYERS layers.
    """
    groups = []
    for group in pattern.split():
        match = re.fullmatch(r"([A-Za-z]+)(?:\*([1-9]\d{0,8}))?", group)
        if match is None:
            raise ConfigError(
                f"cannot read {group!r} in layer pattern {pattern!r}: groups such as cLScc*5, of letters and a count of at most "
                f"{MOST_LAYERS}; change model.layer_pattern"
            )
        groups.append((match.group(1), int(match.group(2) or 1)))
    layers = sum(len(letters) * count for letters, count in groups)
    if layers > MOST_LAYERS:
        raise ConfigError(
            f"the layer pattern {pattern!r} has {layers} layers, more than {MOST_LAYERS}; change model.layer_pattern"
        )
    if not layers:
        raise ConfigError("the layer pattern is empty; set model.layer_pattern, for example 'cLScc*5 cc'")
    return "".join(letters * count for letters, count in groups)


def parse_fp8_layers(text: str, layers: int) -> range:
    """Indices that a slice such as `1:-1` picks of so many layers. Raises ConfigError for other words, and if it picks none."""
    match = SLICE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"cannot read {text!r:.80}: a slice such as 1:-1 or 2:30; change train.fp8_layers")
    start, stop = (int(bound) if bound else None for bound in match.groups())
    picked = range(layers)[start:stop]
    if not picked:
        raise ConfigError(f"the slice {text!r} picks none of {layers} layers; change train.fp8_layers")
    return picked
