"""Draw Taylor attention beside its peers, from the JSON of `based bench kernels`.

python benchmarks/plot_taylor.py docs/benchmarks/h200-taylor.json docs/benchmarks/h200-taylor.svg
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OURS = "based_megatron"


def main(source: Path, target: Path) -> None:
    """Forward + backward: left, batches of 16k and 32k tokens beside the peers; right, one sequence that grows."""
    rows = [r for r in json.loads(source.read_text())["rows"] if r["work"] == "taylor forward + backward"]
    beside = [r for r in rows if r["peers"] and "V64" in r["shape"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2))
    names = [OURS, *beside[0]["peers"]]
    for i, name in enumerate(names):
        heights = [r["value"] if name == OURS else milliseconds(r["peers"][name]) for r in beside]
        left.bar([x + 0.8 * i / len(names) for x in range(len(beside))], heights, 0.8 / len(names), label=name)
    left.set_xticks([x + 0.3 for x in range(len(beside))], [r["shape"].split(" H")[0] for r in beside])
    left.set(yscale="log", ylabel="ms", title="forward + backward, 16 heads of 64")
    left.legend(fontsize="small")
    growing = {length(r): r["value"] for r in rows if r["shape"].startswith("B1 ") and "V64" in r["shape"]}
    lengths = sorted(growing)
    right.plot(lengths, [growing[T] for T in lengths], "o-", label=OURS)
    flash = {length(r): milliseconds(r["peers"]["SDPA flash"]) for r in beside if r["shape"].startswith("B1 ")}
    right.plot(list(flash), list(flash.values()), "s", label="SDPA flash")
    right.set(xscale="log", yscale="log", xlabel="tokens of one sequence", title="time is linear in length")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def length(row: dict[str, Any]) -> int:
    """Tokens of a sequence."""
    return int(re.search(r"T(\d+)", row["shape"])[1])  # type: ignore[index]


def milliseconds(peer: Any) -> float:
    """A peer's time, which is a number or an object with one."""
    return float(peer["ms"] if isinstance(peer, dict) else peer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
