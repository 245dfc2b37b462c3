"""The layers that each pipeline stage holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One chunk of the model on one pipeline rank."""

    layers: range
    is_first: bool
    """Holds the embedding."""
    is_last: bool
    """Holds the final norm and the output projection."""
    chunk: int | None = None
    """Index among this rank's chunks under the interleaved schedule, else None."""


def split_layers(num_layers: int, pipeline_rank: int, pipeline_size: int, chunks: int) -> list[Stage]:
    """The stages of one pipeline rank, one for each of its chunks; chunk c of rank r comes c * pipeline_size + r-th in the model.

    Layers that do not divide go to the earlier stages: the last one also has the output projection.
    """
    total = pipeline_size * chunks
    short, longer = divmod(num_layers, total)
    stages = []
    for chunk in range(chunks):
        place = chunk * pipeline_size + pipeline_rank
        start = place * short + min(place, longer)
        layers = range(start, start + short + (place < longer))
        stages.append(Stage(layers, place == 0, place == total - 1, chunk if chunks > 1 else None))
    return stages
