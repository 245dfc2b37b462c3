"""The task `metadata`: a field of a Python package, somewhere in its METADATA (like FDA)."""

import random
from collections.abc import Iterator, Sequence
from itertools import product

from transformers import PreTrainedTokenizerFast

from based_megatron.evaluation.contexts import Asked
from based_megatron.evaluation.generated.packages import Package
from based_megatron.evaluation.generated.rows import Length, Row, guessable_values, row

ASKED_FIELDS = ("Version", "Summary", "Author", "Author-email", "Home-page", "Requires-Python", "License")
TOKENS_BETWEEN = 4
"""Room for the lines between header and description."""
LONGEST_TOKEN = 16
"""Characters that a token has at most, on the average of a text."""
PLACES = ("start", "middle", "end")
"""Where the header stands in the description."""


def metadata_rows(
    packages: Sequence[Package], size: int, tokenizer: PreTrainedTokenizerFast, length: Length, seed: int
) -> Iterator[Row]:
    """Rows of documents of at most so many tokens: the header in a description that is cut to what is left."""
    guessable = guessable_values(package.fields for package in packages)
    places = list(product(packages, PLACES))
    random.Random(f"metadata {seed} {size}").shuffle(places)
    for package, place in places:
        asked_fields = [
            (key, value)
            for key in ASKED_FIELDS
            if (value := package.fields.get(key)) and (key, value.lower()) not in guessable
        ]
        document = _document(package, place, size, tokenizer, length) if asked_fields else ""
        for key, value in asked_fields if document else ():
            asked = Asked(document, f"\n\n{key}:", value)
            if found := row(asked, key, f"{package.name} {place} {size}", size, length):
                yield found


def _document(package: Package, place: str, size: int, tokenizer: PreTrainedTokenizerFast, length: Length) -> str:
    """Header and description, or nothing if the header alone is longer or there is nothing around it."""
    header = "\n".join(f"{field}: {value}" for field, value in {"Name": package.name, **package.fields}.items())
    room = size - length(header) - TOKENS_BETWEEN
    start = package.description[: size * LONGEST_TOKEN]
    offsets = tokenizer(start, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if room < 1 or not offsets:
        return ""
    shown = start[: offsets[min(room, len(offsets)) - 1][1]].rstrip()
    lines = shown.split("\n")
    cut = {"start": 0, "middle": len(lines) // 2, "end": len(lines)}[place]
    parts = ("\n".join(lines[:cut]).strip("\n"), header, "\n".join(lines[cut:]).strip("\n"))
    return "\n\n".join(filter(None, parts))
