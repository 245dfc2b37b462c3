"""Draw Taylor attention and its baselines from the JSON of `based bench kernels`.

python -m benchmarks.plot_taylor benchmarks/results/h200-taylor.json benchmarks/results/h200-taylor.svg
"""

import sys
from pathlib import Path

from based_megatron.bench.bars import baseline_value
from based_megatron.bench.keys import Baseline, Operation, Passes, Quantity
from based_megatron.bench.pictures import svg_pyplot
from based_megatron.bench.report import Row
from benchmarks.render import read_report

OURS = "based_megatron"
HEAD_DIM = 64


def main(source: Path, target: Path) -> None:
    """Forward + backward: left, batches of 16k and 32k tokens with the baselines; right, one sequence that grows."""
    pyplot = svg_pyplot()
    rows = [row for row in read_report(source).rows if is_drawn(row)]
    compared = [row for row in rows if row.baselines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2))
    baselines = list(compared[0].baselines)
    bars = [(OURS, [row.value for row in compared])]
    bars += [(key.label, [milliseconds(row, key) for row in compared]) for key in baselines]
    for i, (name, heights) in enumerate(bars):
        places = [x + 0.8 * i / len(bars) for x in range(len(compared))]
        left.bar(places, heights, 0.8 / len(bars), label=name)
    left.set_xticks(
        [x + 0.3 for x in range(len(compared))], [f"B{row.sizes.batch} T{row.sizes.tokens}" for row in compared]
    )
    left.set(yscale="log", ylabel="ms", title=f"forward + backward, 16 heads of {HEAD_DIM}")
    left.legend(fontsize="small")
    single = [row for row in rows if row.sizes.batch == 1]
    points = sorted({row.sizes.tokens: row.value for row in single}.items())
    right.plot(*zip(*points, strict=True), "o-", label=OURS)
    flash = [(row.sizes.tokens, milliseconds(row, Baseline.SDPA_FLASH)) for row in single if row.baselines]
    right.plot(*zip(*flash, strict=True), "s", label=Baseline.SDPA_FLASH.label)
    right.set(xscale="log", yscale="log", xlabel="tokens of one sequence", title="time is linear in length")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def is_drawn(row: Row) -> bool:
    """True if a row is a time of both passes of Taylor attention at the head dim of the plot."""
    measured = (row.operation, row.passes, row.quantity, row.sizes.head_dim)
    return measured == (Operation.TAYLOR_ATTENTION, Passes.BOTH, Quantity.MILLISECONDS, HEAD_DIM)


def milliseconds(row: Row, key: Baseline) -> float:
    """A baseline's time. Raises ValueError if it gave none."""
    value = baseline_value(row.baselines, key)
    if value is None:
        raise ValueError(f"{key.label} has no time: {row.baselines.get(key)}")
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
