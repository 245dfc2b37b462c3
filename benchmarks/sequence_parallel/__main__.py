"""Measure the parts of one rank that shares a sequence on this device, and model many ranks from them.

    python -m benchmarks.sequence_parallel --output runs/bench        # --quick on a CPU; --links FILE for another cluster
    python -m benchmarks.sequence_parallel --measured benchmarks/results/h100-sequence-parallel.json --links mine.yaml

Measured: all ranks' programs as threads against fp64 (slices.py), each part of a rank (rank_parts.py), whole steps (rank_steps.py),
and how much slower kernels run during a copy (interference.py). Modelled: links (links.py), bytes (traffic.py), ranks that wait
for each other (simulation.py). Nothing here has run on more than one GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from based_megatron.bench.models import based_model, model_config, one_rank, parameters_in_billions
from based_megatron.bench.report import Failure, facts_of
from based_megatron.bench.timing import Bench
from based_megatron.errors import BasedError, ConfigError
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.build import DTYPES
from based_megatron.parallel.topology import pick_device
from benchmarks.sequence_parallel.links import Links, read_links
from benchmarks.sequence_parallel.modelled import exposed_exchanges, link_costs, scaled_steps
from benchmarks.sequence_parallel.plot import draw
from benchmarks.sequence_parallel.rank_parts import cover_times, local_work, part_times
from benchmarks.sequence_parallel.rank_steps import graph_times, step_times
from benchmarks.sequence_parallel.results import Measured, Modelled, Results, read_results
from benchmarks.sequence_parallel.slices import slice_checks
from benchmarks.sequence_parallel.tables import to_markdown
from benchmarks.sequence_parallel.traffic import LayerTraffic

COMMAND = "python -m benchmarks.sequence_parallel"
SEQUENCES = (1 << 17, 1 << 23)
"""Tokens of the shortest and the longest sequence whose steps are modelled."""
INTERFERENCE_TOKENS = 16384
LONGEST_REPLAYED = 16384
"""Longest slice whose step is replayed as a CUDA graph: the host may bound steps up to about here."""


@dataclass(frozen=True)
class Config:
    """Measure the parts of one rank that shares a sequence on this device, and model many ranks from them."""

    output: Path = Path("runs/bench")
    """Folder of the results."""
    name: str = "sequence-parallel"
    """Name of the files, without their suffixes."""
    only: str = ""
    """Run only the cases whose name has this text in it."""
    quick: bool = False
    """Tiny sizes, that a CPU can run: shows that everything works, not how fast it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on: auto takes a GPU if there is one."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Kernels of ours to time: auto takes triton on a GPU, else the PyTorch references."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of activations and weights."""
    seed: int = 0
    """Seed of the random inputs, and of the jitter."""
    links: Path | None = None
    """YAML or JSON with parameters of the links between GPUs (links.py); missing ones keep their defaults."""
    measured: tuple[Path, ...] = ()
    """JSON of earlier runs, whose measured times are taken instead of measuring; later files replace earlier ones."""


@dataclass(frozen=True)
class Scope:
    """Sizes that are measured and modelled."""

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
    """Tokens of a rank."""
    rank_counts: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    sequence_tokens: tuple[float, float] = SEQUENCES


QUICK = Scope((16, 32), (4, 8, 16), (0, math.inf))


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, model, write; returns 1 if something failed, 2 if the user must change something."""
    try:
        return run(tyro.cli(Config, args=argv, prog=COMMAND), shlex.join([*COMMAND.split(), *argv]))
    except BasedError as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return 2


def run(config: Config, command: str) -> int:
    """Measure, model and write what the configuration asks for; returns the exit code."""
    device = pick_device(config.device, 0)
    torch.manual_seed(config.seed)
    backend = resolve_backend(config.backend, device)
    bench = Bench(device, DTYPES[config.precision], backend, config.quick, config.seed)
    scope, links = QUICK if config.quick else Scope(), read_links(config.links)
    if config.quick and config.links is None:
        links = dataclasses.replace(links, node_ranks=4)
    facts, measured = facts_of(bench, command), Measured()
    if config.measured:
        earlier = [read_results(path) for path in config.measured]
        facts, measured = earlier_facts(earlier, command), earlier_measured(earlier)
    results = Results(facts | {"links": str(config.links or "defaults of links.py")}, measured, Modelled())
    measuring = {} if config.measured else measuring_cases(bench, scope, links.node_ranks)
    modelling = modelling_cases(scope, links, LayerTraffic.of(model_config(bench)), config.seed)
    names = [*measuring, *modelling]
    chosen = [name for name in names if config.only in name]
    if not chosen:
        raise ConfigError(f"--only {config.only!r} is in no case of `{COMMAND}`: {'; '.join(names)}")
    for name in chosen:
        print(name, flush=True)
        try:
            if name in measuring:
                results = dataclasses.replace(results, measured=results.measured.joined(measuring[name]()))
            else:
                modelled = modelling[name](results.measured)
                results = dataclasses.replace(results, modelled=results.modelled.joined(modelled))
        except Exception as error:
            traceback.print_exc()
            results = dataclasses.replace(results, failures=(*results.failures, Failure.of(name, error)))
        # What has been measured is kept, whatever ends the run.
        written = write(results, config.output, config.name, plot=name == chosen[-1])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(*written, sep="\n")
    if results.failed():
        print(f"{COMMAND}: failed: {'; '.join(results.failed())}", file=sys.stderr)
    return 1 if results.failed() else 0


def measuring_cases(bench: Bench, scope: Scope, node_ranks: int) -> dict[str, Callable[[], Measured]]:
    """Everything that is measured on this device."""
    cases: dict[str, Callable[[], Measured]] = {"checks": lambda: Measured(checks=slice_checks(bench))}
    for L in scope.lengths:
        cases[f"parts L{L}"] = functools.partial(lambda L: Measured(parts=part_times(bench, L)), L)
    cases["local work"] = lambda: Measured(local_work=local_work(bench, scope.rank_counts, node_ranks))
    if bench.backend == "triton" and bench.device.type == "cuda":
        cases["interference"] = lambda: _interference(bench)
    cases["covers and steps"] = lambda: _covers_and_steps(bench, scope)
    cases["steps as CUDA graphs"] = lambda: _graphs(bench, scope)
    return cases


def modelling_cases(
    scope: Scope, links: Links, traffic: LayerTraffic, seed: int
) -> dict[str, Callable[[Measured], Modelled]]:
    """Everything that is modelled, from what has been measured so far."""
    lengths, rank_counts = scope.lengths, scope.rank_counts
    middle = lengths[len(lengths) // 2]
    return {
        "one layer": lambda _: Modelled(links=link_costs(links, traffic, middle, rank_counts)),
        "one exchange": lambda measured: Modelled(
            exchanges=exposed_exchanges(links, traffic, measured, lengths, rank_counts)
        ),
        "scaling": lambda measured: Modelled(
            steps=scaled_steps(links, traffic, measured, rank_counts, seed, scope.sequence_tokens)
        ),
    }


def earlier_measured(earlier: Sequence[Results]) -> Measured:
    """Measurements of earlier runs; what a later one has measured again replaces that of one before.

    Raises ConfigError if they are of different devices.
    """
    devices = {results.facts["device"] for results in earlier}
    if len(devices) > 1:
        raise ConfigError(f"--measured: files of different devices, {', '.join(sorted(devices))}: give files of one")
    return functools.reduce(Measured.joined, (results.measured for results in earlier))


def earlier_facts(earlier: Sequence[Results], command: str) -> dict[str, str]:
    """Facts of the run that measured first, and the commands that measured."""
    first = earlier[0].facts
    kept = {key: first[key] for key in ("device", "dtype", "backend", "python", "packages") if key in first}
    commands = [results.facts.get("measured by", results.facts["command"]) for results in earlier]
    return {**kept, "command": command, "measured by": "; ".join(commands)}


def write(results: Results, folder: Path, name: str, plot: bool) -> list[Path]:
    """Write NAME.md, NAME.json and, where matplotlib is installed, NAME.svg; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data, drawing = (folder / f"{name}.{suffix}" for suffix in ("md", "json", "svg"))
    markdown.write_text(to_markdown(results, name))
    data.write_text(results.to_json())
    try:
        if plot:
            draw(results, drawing)
            return [markdown, data, drawing]
    except ImportError:
        pass
    return [markdown, data]


def _covers_and_steps(bench: Bench, scope: Scope) -> Measured:
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        return Measured(
            1e3 * parameters_in_billions(model),
            covers=[cover for L in scope.lengths for cover in cover_times(bench, model, L)],
            steps=step_times(bench, model, scope.lengths),
        )


def _graphs(bench: Bench, scope: Scope) -> Measured:
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        return Measured(steps=graph_times(bench, model, [L for L in scope.lengths if L <= LONGEST_REPLAYED]))


def _interference(bench: Bench) -> Measured:
    # Triton is there on machines with a GPU only.
    from benchmarks.sequence_parallel.interference import slowdowns

    return Measured(slowdowns=slowdowns(bench, bench.size(INTERFERENCE_TOKENS, QUICK.lengths[-1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
