"""Memory that `based preflight` predicts, against the peaks of real training steps.

    python -m benchmarks.preflight_memory --output runs/preflight                               one GPU
    torchrun --nproc-per-node 2 -m benchmarks.preflight_memory --output runs/preflight          two
    python -m benchmarks.preflight_memory --quick --output runs/preflight                       a CPU: all paths, no peaks

Takes three steps of each case on random tokens. Prints a table in Markdown and writes it with all digits as JSON. A case that does not fit
into the device is reported, not an error.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from based_megatron.config import Config, load_config
from based_megatron.data.batch import MicroBatch
from based_megatron.model.build import build_model
from based_megatron.parallel.environment import RankInfo, rank_from_environment
from based_megatron.parallel.sequence.slices import even_bounds, slice_of
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device
from based_megatron.preflight.memory import rank_memory
from based_megatron.train.optimizer import build_engine, set_learning_rate
from based_megatron.train.step import build_step

GIB = 2**30
STEPS = 3
"""The first makes the moments; the others have the peak of a long run."""


@dataclass(frozen=True)
class Case:
    """One set of settings."""

    config: str
    micro_batch: int
    tokens: int = 2048
    recompute: Literal["none", "mixer", "full"] = "none"
    zero_stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    ranks: int = 1
    accumulation: int = 1

    @property
    def name(self) -> str:
        layout = [f"{key} {n}" for key in ("tensor", "pipeline", "context") if (n := vars(self)[key]) > 1]
        parts = [
            f"{self.micro_batch} x {self.tokens}",
            *layout,
            f"ZeRO-{self.zero_stage}",
            f"recompute {self.recompute}",
            *([f"{self.accumulation} micro batches"] if self.accumulation > 1 else []),
        ]
        return f"{self.config}, {', '.join(parts)}, {self.ranks} GPU{'s' if self.ranks > 1 else ''}"


CASES = (
    Case("based-360m", 8),
    Case("based-360m", 4, 8192, "mixer"),
    Case("based-360m", 16, recompute="full"),
    Case("based-1b", 1),
    Case("based-1b", 4),
    Case("based-1b", 8),
    Case("based-1b", 8, recompute="mixer"),
    Case("based-1b", 2, 8192, "full"),
    Case("based-1b", 4, ranks=2),
    Case("based-1b", 4, zero_stage=2, ranks=2),
    Case("based-1b", 4, zero_stage=2, ranks=2, accumulation=2),
    Case("based-1b", 4, zero_stage=3, ranks=2),
    Case("based-1b", 8, tensor=2, ranks=2),
    Case("based-1b", 4, pipeline=2, ranks=2, accumulation=4),
    Case("based-1b", 1, 32768, context=2, ranks=2),
    Case("based-360m", 8, zero_stage=2, ranks=2),
    Case("based-360m", 8, zero_stage=3, ranks=2, recompute="full"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """All cases of as many ranks as there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="tiny models on a CPU")
    arguments = parser.parse_args(argv)
    rank = rank_from_environment()
    cases = [case for case in CASES if case.ranks == rank.world_size and arguments.only in case.name]
    if arguments.quick:
        rows = measure(cases, rank, quick=True)
    else:
        # A process of its own for each case: what one has left in memory would count for the next.
        rows = []
        for number, case in enumerate(cases, start=1):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                here = dataclasses.replace(rank, master_port=rank.master_port + number)
                rows += process.submit(measure, [case], here).result()
    if rank.rank == 0:
        write(arguments.output, rows, rank.world_size)
    return 0


def measure(cases: Sequence[Case], rank: RankInfo, quick: bool = False) -> list[dict[str, Any]]:
    """Rows of cases, one after another, with a line printed for each."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # its store is that of the launcher, at another port
    device = pick_device("cpu" if quick else "auto", rank.local_rank)
    join(rank, device, timeout_seconds=120)
    rows = []
    for case in cases:
        rows.append(row_of(case, device, quick))
        if rank.rank == 0:
            print(line_of(rows[-1]), flush=True)
    leave()
    return rows


def config_of(case: Case, quick: bool) -> Config:
    """The settings of a case; quick ones are tiny."""
    config = load_config("tiny" if quick else case.config)
    data_parallel = case.ranks // (case.tensor * case.pipeline * case.context)
    tokens = 64 * case.context if quick else case.tokens
    micro_batch = 1 if quick else case.micro_batch
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path="unused", sequence_length_tokens=tokens, isolate_documents=False),
        parallel=dataclasses.replace(
            config.parallel,
            tensor=case.tensor,
            pipeline=case.pipeline,
            context=case.context,
            zero_stage=case.zero_stage,
        ),
        train=dataclasses.replace(
            config.train,
            precision="bf16",
            recompute=case.recompute,
            micro_batch_sequences=micro_batch,
            global_batch_sequences=micro_batch * data_parallel * case.accumulation,
        ),
    )


def row_of(case: Case, device: torch.device, quick: bool) -> dict[str, Any]:
    """Predicted and measured bytes of this rank."""
    config, began = config_of(case, quick), time.perf_counter()
    topology = build_topology(config.parallel, device)
    predicted = rank_memory(config, topology.world_size, topology.pipeline.rank)
    try:
        measured = train_steps(config, topology, case.accumulation)
        failure = ""
    except torch.OutOfMemoryError:
        measured, failure = {}, "out of memory"
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **dataclasses.asdict(case),
        "predicted": {**dataclasses.asdict(predicted), "allocated": predicted.allocated},
        "measured": measured,
        "failure": failure,
        "seconds": time.perf_counter() - began,
    }


def train_steps(config: Config, topology: Topology, accumulation: int) -> dict[str, int]:
    """Bytes of this rank by the moment: before the model is built, between steps, and at the peaks."""
    on_gpu = topology.device.type == "cuda"
    measured = {"before": torch.cuda.memory_allocated()} if on_gpu else {}
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage)
    bounds = even_bounds(config.data.sequence_length_tokens, topology.context.size)
    here = slice_of(bounds, topology.context.rank)
    generator = torch.Generator().manual_seed(topology.data.rank)
    shape = (config.train.micro_batch_sequences, config.data.sequence_length_tokens + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    inputs, labels = (x[:, here].contiguous() for x in (tokens[:, :-1], tokens[:, 1:]))
    batches = [MicroBatch(inputs, labels, torch.ones(inputs.shape), None, bounds)] * accumulation
    for number in range(STEPS):
        set_learning_rate(engine, 1e-6)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            measured["between steps"] = torch.cuda.memory_allocated()
        step.accumulate(batches)
        if on_gpu:
            measured["forward and backward"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        step.update()
        if on_gpu:
            measured["update"] = torch.cuda.max_memory_allocated()
        if on_gpu and number == STEPS - 1:
            measured["allocated"] = max(measured["forward and backward"], measured["update"])
            measured["reserved"] = torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            measured["device"] = total - free
    return measured


def line_of(row: dict[str, Any]) -> str:
    """A line of the table, in GiB."""
    predicted, measured = row["predicted"], row["measured"]
    if not measured:
        peaks = [row["failure"] or "not measured", "", "", "", ""]
    else:
        keys = ("allocated", "forward and backward", "update", "between steps")
        peaks = [f"{measured[key] / GIB:.2f}" for key in keys]
        peaks.append(f"{100 * (predicted['allocated'] / measured['allocated'] - 1):+.1f} %")
    return f"| {row['case']} | {predicted['allocated'] / GIB:.2f} | {' | '.join(peaks)} |"


def write(output: Path, rows: list[dict[str, Any]], ranks: int) -> None:
    """The table and all digits."""
    name = ", ".join(sorted({row["device"] for row in rows}))
    head = "| case | predicted GiB | measured peak | forward, backward | update | between steps | error |\n|---|---|---|---|---|---|---|\n"
    output.mkdir(parents=True, exist_ok=True)
    stem = f"preflight-memory-{ranks}"
    (output / f"{stem}.md").write_text(
        f"- device: {name}\n- ranks: {ranks}\n\n{head}{''.join(line_of(row) + chr(10) for row in rows)}"
    )
    facts = {"device": name, "ranks": ranks, "torch": torch.__version__}
    (output / f"{stem}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
