"""A picture of recall at one validation: losses by training count, repeats next to first occurrences, and of AR hits by distance."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 960, 360
LEFT, TOP, BOTTOM = 40, 60, 330
INK, GRID = (40, 40, 40), (224, 224, 224)
COLOURS = {"first": (150, 160, 175), "repeat": (32, 80, 160), "AR hits": (192, 64, 32)}
Bars = Mapping[str, Mapping[str, float | None]]
"""Heights of the bars of each group, by their colours' names."""


def recall_image(fields: Mapping[str, Any], step: int) -> np.ndarray:
    """uint8 [height, width, 3], from the fields of an event `recall`."""
    from PIL import Image, ImageDraw  # TensorBoard needs it too

    by_count = {name: {kind: row[0] for kind, row in rows.items()} for name, rows in fields["by_count"].items()}
    by_distance = {name: {"AR hits": row[0]} for name, row in fields["by_distance"].items()}
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    heights = [value for bars in (by_count, by_distance) for group in bars.values() for value in group.values()]
    top = max([1.0, *(value for value in heights if value is not None and np.isfinite(value))])
    middle = WIDTH * 3 // 5
    _panel(
        draw, (LEFT, middle - 20), by_count, top, f"step {step}: loss in nats by occurrences of the bigram in training"
    )
    _panel(draw, (middle + 20, WIDTH - 12), by_distance, top, "AR hits by tokens since the bigram")
    return np.asarray(image)


def _panel(draw: "ImageDraw", span: tuple[int, int], bars: Bars, top: float, title: str) -> None:
    left, right = span
    draw.text((left, 8), title, fill=INK)
    _legend(draw, left, list(next(iter(bars.values()))))
    for level in range(int(top) + 1):
        y = _height(level, top)
        draw.line((left, y, right, y), fill=GRID)
        draw.text((left - 14, y - 6), str(level), fill=INK)
    width = (right - left) / len(bars)
    for place, (name, group) in enumerate(bars.items()):
        x, bar = left + place * width, 0.8 * width / len(group)
        for number, (kind, value) in enumerate(group.items()):
            if value is not None and np.isfinite(value):
                begin = x + 0.1 * width + number * bar
                draw.rectangle((begin, _height(value, top), begin + bar - 2, BOTTOM), fill=COLOURS[kind])
                draw.text((begin, _height(value, top) - 12), f"{value:.2f}", fill=INK)
        draw.text((x + 0.1 * width, BOTTOM + 6), name.replace("_up", "+"), fill=INK)


def _legend(draw: "ImageDraw", left: int, kinds: Sequence[str]) -> None:
    for place, kind in enumerate(kinds):
        x = left + 80 * place
        draw.rectangle((x, 28, x + 8, 36), fill=COLOURS[kind])
        draw.text((x + 12, 26), kind, fill=INK)


def _height(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top
