"""The layer pattern: a short string that names the mixer of each layer."""

import re

from based_megatron.errors import ConfigError

MIXERS = {"c": "gated_conv", "L": "linear_attention", "S": "sliding_window", "A": "full_attention"}


def parse_layer_pattern(pattern: str) -> str:
    """Expand a layer pattern to one letter per layer: `cLS*2 cc` -> `cLScLScc`.

    Raises ConfigError for an empty pattern or an unknown letter.
    """
    expanded = []
    for group in pattern.split():
        match = re.fullmatch(r"([A-Za-z]+)(?:\*([1-9]\d*))?", group)
        unknown = sorted(set(match.group(1)) - set(MIXERS)) if match else [group]
        if match is None or unknown:
            raise ConfigError(
                f"cannot read {' '.join(unknown)!r} in layer pattern {pattern!r}: groups such as cLScc*5, with letters "
                f"{', '.join(f'{k} ({v})' for k, v in MIXERS.items())}; change model.layer_pattern"
            )
        expanded.append(match.group(1) * int(match.group(2) or 1))
    if not expanded:
        raise ConfigError("the layer pattern is empty; set model.layer_pattern, for example 'cLScc*5 cc'")
    return "".join(expanded)
