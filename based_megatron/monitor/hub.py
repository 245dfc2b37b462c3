"""The metrics hub: values recorded anywhere in a step, summed up on the device, and read once at a log point.

Between log points nothing waits for the device. At a log point the ranks add their vectors up in two collectives, one of sums
and one of maxima, whatever the number of metrics, and the host reads both at once. A third one gathers what names a rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.parallel.topology import Topology

Reduce = Literal["mean", "rms", "sum", "norm", "max", "min", "last"]
Group = Literal["world", "layer", "data_context"]

SUMMED = ("mean", "rms", "sum", "norm")
"""Reductions that add up over ranks; of all others the largest is taken."""
ALONE: Mapping[Group, bool] = {"world": True, "layer": True, "data_context": True}


@dataclass
class _Record:
    """What one rank has of one metric since the last log point."""

    reduce: Reduce
    counts: bool
    """False where this rank's part of a sum is a copy of what another rank holds."""
    total: Tensor
    weight: Tensor


class Metrics:
    """Takes values by name and gives one flat dictionary, equal on every rank.

    `reduce` says what becomes of the values of all micro batches, steps and ranks since the last log point:

        mean    the mean, each value weighed by its `count`
        rms     the root of the mean square, likewise: the RMS of a tensor from those of its parts
        sum     the sum
        norm    the root of the sum of squares: the norm of a tensor from those of its parts
        max     the largest; inf if one is nan
        min     the smallest; -inf if one is nan
        last    the newest; the largest of ranks that differ

    `group` says which ranks hold different parts of a `sum` or a `norm`; all others hold copies, which count once:

        world           all ranks
        layer           the data and context ranks of the layer's stage; its tensor parallel ranks hold copies
        data_context    data and context ranks; tensor parallel ranks and pipeline stages hold copies
    """

    def __init__(
        self, device: torch.device, counts: Mapping[Group, bool] = ALONE, ranks: dist.ProcessGroup | None = None
    ) -> None:
        """counts: whether this rank's part of a group adds to sums. ranks: those that log together; None if alone."""
        self.wanted = False
        """True in a step that will be logged: what costs time is recorded in such steps only."""
        self._device, self._counts, self._ranks = device, counts, ranks
        self._records: dict[str, _Record] = {}
        self._layout: dict[str, Reduce] = {}

    @torch.no_grad()
    def record(
        self,
        name: str,
        value: Tensor | float,
        reduce: Reduce = "mean",
        *,
        group: Group = "world",
        count: Tensor | float = 1.0,
    ) -> None:
        """Add a value: a number, or a scalar on the device, which is not read.

        count: how many items the value is the mean or the RMS of.
        """
        total, weight = self._scalar(value), self._scalar(count)
        if reduce in ("rms", "norm"):
            total = total.square()
        if reduce in ("mean", "rms"):
            total = total * weight
        elif reduce == "min":
            total = -total
        if reduce in ("max", "min"):
            # A maximum over ranks may drop a nan.
            total = total.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        before = self._records.get(name)
        if before is not None:
            assert before.reduce == reduce, f"{name} is recorded as {before.reduce} and as {reduce}"
            if reduce in SUMMED:
                total, weight = before.total + total, before.weight + weight
            elif reduce != "last":
                total = torch.maximum(before.total, total)
        self._records[name] = _Record(reduce, self._counts[group], total, weight)

    @torch.no_grad()
    def collect(self) -> dict[str, float]:
        """Values since the last call, by name in alphabetical order, and start over (collective).

        A metric that any rank has recorded is there on all of them.
        """
        values = self._reduced()
        if values is None:
            self._agree()
            values = self._reduced()
        assert values is not None
        self._records = {}
        return values

    def each_rank(self, value: float) -> list[float]:
        """The value of each rank, by rank (collective)."""
        mine = self._scalar(value)
        if self._ranks is None:
            return [float(mine)]
        everywhere = torch.zeros(dist.get_world_size(self._ranks), dtype=mine.dtype, device=mine.device)
        everywhere[dist.get_rank(self._ranks)] = mine
        dist.all_reduce(everywhere, group=self._ranks)
        return everywhere.tolist()

    def _reduced(self) -> dict[str, float] | None:
        """The metrics of the layout over all ranks; None if some rank has recorded one that is not in it."""
        summed = [name for name, reduce in self._layout.items() if reduce in SUMMED]
        largest = [name for name, reduce in self._layout.items() if reduce not in SUMMED]
        records = self._records
        is_new = float(not records.keys() <= self._layout.keys())
        totals = [records[name].total if name in records and records[name].counts else 0.0 for name in summed]
        weights = [records[name].weight if name in records else 0.0 for name in summed]
        peaks = [records[name].total if name in records else -math.inf for name in largest]
        read = self._over_ranks([is_new, *totals, *weights], peaks)
        if read[0]:
            return None
        values = {}
        for i, name in enumerate(summed, start=1):
            if weight := read[i + len(summed)]:
                values[name] = _finished(self._layout[name], read[i], weight)
        for name, peak in zip(largest, read[1 + 2 * len(summed) :], strict=True):
            if peak != -math.inf:
                values[name] = -peak if self._layout[name] == "min" else peak
        return dict(sorted(values.items()))

    def _over_ranks(self, sums: list[Tensor | float], peaks: list[Tensor | float]) -> list[float]:
        vectors = [torch.stack([self._scalar(x) for x in values]) for values in (sums, peaks) if values]
        if self._ranks is not None:
            for vector, op in zip(vectors, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=False):
                dist.all_reduce(vector, op=op, group=self._ranks)
        return torch.cat(vectors).tolist()

    def _agree(self) -> None:
        """Make the layout hold every name of every rank, in one order."""
        mine = self._layout | {name: record.reduce for name, record in self._records.items()}
        everywhere: list[dict[str, Reduce]] = [mine]
        if self._ranks is not None:
            everywhere = [{} for _ in range(dist.get_world_size(self._ranks))]
            dist.all_gather_object(everywhere, mine, group=self._ranks)
        self._layout = dict(sorted((name, reduce) for names in everywhere for name, reduce in names.items()))

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().double()
        # A kernel fills the number in: a copy from the host would wait.
        return torch.full((), value, dtype=torch.float64, device=self._device)


def build_metrics(topology: Topology) -> Metrics:
    """The hub of a run over all of its ranks."""
    is_first, is_last_stage = topology.tensor.rank == 0, topology.pipeline.rank == topology.pipeline.size - 1
    counts: dict[Group, bool] = {"world": True, "layer": is_first, "data_context": is_first and is_last_stage}
    return Metrics(topology.device, counts, dist.group.WORLD)


def _finished(reduce: Reduce, total: float, weight: float) -> float:
    """The value of a metric from its sums over all ranks."""
    if reduce == "mean":
        return total / weight
    if reduce == "rms":
        return math.sqrt(total / weight)
    return math.sqrt(total) if reduce == "norm" else total
