"""Draw the loss curve of a run as an SVG: python -m benchmarks.plot_loss RUN_DIR OUTPUT.svg"""

import sys
from pathlib import Path

from based_megatron.monitor.events import read_events

WIDTH, HEIGHT, MARGIN = 640, 300, 50


def main() -> None:
    """Read events.jsonl of the run folder and write the drawing."""
    run_dir, output = map(Path, sys.argv[1:])
    events = list(read_events(run_dir / "events.jsonl"))
    train = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    held_out = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
    last_step, losses = max(train), [*train.values(), *held_out.values()]
    low, high = int(min(losses)), int(max(losses)) + 1

    def place(step: int, loss: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last_step
        return round(x, 1), round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - low) / (high - low), 1)

    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in sorted(train.items())))
    dots = "".join(
        '<circle cx="{}" cy="{}" r="5" fill="#c03020"/>'.format(*place(*point)) for point in held_out.items()
    )
    grid = "".join(_level(place(0, loss)[1], loss) for loss in range(low, high + 1))
    output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{grid}'
        f'<polyline points="{line}" fill="none" stroke="#2050a0" stroke-width="2"/>{dots}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">step 1 to {last_step}</text>'
        f'<text x="{MARGIN}" y="26">loss in nats: <tspan fill="#2050a0">training</tspan>, '
        f'<tspan fill="#c03020">validation</tspan></text></svg>\n'
    )


def _level(y: float, loss: int) -> str:
    label = f'<text x="{MARGIN - 10}" y="{y + 4}" text-anchor="end">{loss}</text>'
    return f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#dddddd"/>{label}'


if __name__ == "__main__":
    main()
