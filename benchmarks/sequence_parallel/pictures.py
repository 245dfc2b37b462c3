"""Draw the pictures of docs/sequence-parallelism.md.

python -m benchmarks.sequence_parallel.pictures docs
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

BLUE, ORANGE, GREEN, GRAY, RED = "#9ecae1", "#fdd0a2", "#c7e9c0", "#eeeeee", "#cb181d"
INK = "#333333"


@dataclass
class Picture:
    """Boxes, words and arrows, in pixels from the upper left."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, text: str = "", color: str = GRAY, height: float = 30) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{color}" stroke="{INK}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 4, text, anchor="middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", color: str = INK, bold: bool = False) -> None:
        if text:
            weight = ' font-weight="bold"' if bold else ""
            escaped = text.replace("&", "&amp;").replace("<", "&lt;")
            self.parts.append(
                f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}"{weight}>{escaped}</text>'
            )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str = RED) -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.5" '
            f'marker-end="url(#tip)"/>'
        )

    def save(self, path: Path) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="sans-serif" font-size="12">'
        )
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{RED}"/></marker></defs>'
        )
        background = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        path.write_text("\n".join([head, tip, background, *self.parts, "</svg>"]) + "\n")


def states() -> Picture:
    """Slices of two documents; which moments flow where, forward and backward."""
    picture, left, width = Picture(860, 330), 90, 180
    places = [left + rank * (width + 10) for rank in range(4)]
    for rank, x in enumerate(places):
        picture.text(x + width / 2, 20, f"rank {rank}", anchor="middle", bold=True)
    picture.text(10, 52, "tokens")
    for rank, x in enumerate(places):
        if rank == 1:
            picture.box(x, 33, width / 2, "document A", BLUE)
            picture.box(x + width / 2, 33, width / 2, "document B", ORANGE)
        else:
            picture.box(x, 33, width, "document A" if rank == 0 else "document B", BLUE if rank == 0 else ORANGE)
    picture.text(10, 92, "forward", bold=True)
    picture.text(10, 122, "moments")
    picture.text(10, 182, "prefix")
    own = ["M0: of A", "M1: of B, the last", "M2: of B", "M3: needed by none"]
    sums = [("nothing", GRAY), ("M0", BLUE), ("M1", ORANGE), ("M1 + M2", ORANGE)]
    flows = [(0, 1), (1, 2), (1, 3), (2, 3)]
    _row(picture, places, width, 103, own, 163, sums, flows)
    picture.text(10, 222, "backward", bold=True)
    picture.text(10, 252, "moments")
    picture.text(10, 312, "suffix")
    own = ["dM0: needed by none", "dM1: of A, the first", "dM2: of B", "dM3: of B"]
    sums = [("dM1", BLUE), ("dM2 + dM3", ORANGE), ("dM3", ORANGE), ("nothing", GRAY)]
    _row(picture, places, width, 233, own, 293, sums, [(1, 0), (2, 1), (3, 1), (3, 2)])
    return picture


def _row(
    picture: Picture, places: list[int], width: int, top: int, own: list[str], bottom: int,
    sums: list[tuple[str, str]], flows: list[tuple[int, int]],
) -> None:  # fmt: skip
    for x, name, (total, color) in zip(places, own, sums, strict=True):
        picture.box(x + 10, top, width - 20, name, GREEN)
        picture.box(x + 10, bottom, width - 20, total, color)
    for source, target in flows:
        side = 1 if target > source else -1
        middle = places[source] + width / 2
        picture.arrow(middle + side * 25, top + 30, places[target] + width / 2 - side * 25, bottom)


def halo() -> Picture:
    """Boundary rows of a slice, in front of the next one, and their gradients on the way back."""
    picture = Picture(860, 240)
    picture.text(10, 20, "a slice longer than the window", bold=True)
    for rank, x in enumerate((40, 330)):
        picture.box(x, 35, 200, f"slice {rank}")
        picture.box(x + 200, 35, 60, "boundary", ORANGE)
    picture.box(620, 35, 60, "halo", ORANGE)
    picture.box(680, 35, 140, "slice 2")
    picture.arrow(560, 68, 648, 68)
    picture.text(570, 84, "keys and values", color=RED)
    picture.arrow(648, 30, 560, 30)
    picture.text(565, 22, "their gradients", color=RED)
    picture.text(10, 120, "slices shorter than the window: the halo of slice 3 is of three ranks", bold=True)
    parts = [(440, 35), (475, 90), (565, 90)]
    for rank, (x, (place, width)) in enumerate(zip((40, 210, 380), parts, strict=True)):
        if rank == 0:
            picture.box(x, 135, 65, "slice 0")
            picture.box(x + 65, 135, 35, "", ORANGE)
        else:
            picture.box(x, 135, 100, f"slice {rank}", ORANGE)
        picture.arrow(x + (82 if rank == 0 else 50), 166, place + width / 2, 198)
        picture.box(place, 200, width, "halo" if rank == 1 else "", ORANGE)
    picture.box(655, 200, 110, "slice 3")
    return picture


Lane = tuple[str, list[tuple[str, int]], int, int, str]
"""Title; pieces of work and their widths; before which piece the exchange starts, and is waited for; its name."""


def timeline() -> Picture:
    """Computation of a rank, and the exchange that is under way meanwhile."""
    lanes: list[Lane] = [
        ("linear attention, forward",
         [("k, v projection", 120), ("chunk scan: moments", 130), ("q projection", 110), ("states", 70), ("outputs", 90)],
         2, 3, "states of slices"),
        ("linear attention, backward",
         [("g = do / Z", 90), ("adjoint chunk scan: moments", 180), ("dq", 110), ("adjoint states", 110), ("dk, dv", 90)],
         2, 3, "adjoint states"),
        ("window, forward",
         [("last keys, values", 120), ("q, k, v projection, rotary", 220), ("attention", 110)], 1, 2, "halo"),
        ("window, backward",
         [("dq", 90), ("dk, dv of the halo", 130), ("dk, dv of the slice", 170), ("add the late rows", 130)],
         2, 3, "the halo's gradient"),
        ("convolution, forward",
         [("last inputs", 90), ("projection", 220), ("convolution", 110)], 1, 2, "halo"),
        ("convolution, backward",
         [("d of the halo", 110), ("d of the slice, dweight", 220), ("add the late rows", 130)],
         1, 2, "the halo's gradient"),
    ]  # fmt: skip
    picture = Picture(860, 20 + 85 * len(lanes))
    for number, (title, pieces, start, wait, exchange) in enumerate(lanes):
        y, x = 20 + 85 * number, 190
        picture.text(10, y + 19, title, bold=True)
        edges = []
        for i, (name, width) in enumerate(pieces):
            edges.append(x)
            picture.box(x, y, width, name, BLUE if start <= i < wait else GRAY)
            x += width
        picture.box(edges[start], y + 36, edges[wait] - edges[start], exchange, ORANGE, height=22)
        picture.arrow(edges[start] - 8, y + 30, edges[start] - 1, y + 46)
        picture.arrow(edges[wait] + 1, y + 46, edges[wait] + 8, y + 31)
    return picture


def main(folder: Path) -> None:
    """Write the three pictures."""
    for name, draw in (("states", states), ("halo", halo), ("timeline", timeline)):
        draw().save(folder / f"sequence-{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
