"""`based bench sequence-parallel`: the parts of one rank measured on this device, and many ranks modelled from them.

Legend: P ranks that share a sequence, S its tokens, L = S / P tokens of a rank.

Measured: all ranks' programs as threads against fp64 (slices.py), each part of a rank (rank_parts.py), whole steps (rank_steps.py),
and how much slower kernels run beside a copy (interference.py). Modelled: links (links.py), bytes (traffic.py), ranks that wait
for each other (scaling.py). Nothing here has run on more than one GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from based_megatron.bench.links import Links, read_links
from based_megatron.bench.models import based_model, model_config, one_rank, parameters_in_billions
from based_megatron.bench.rank_model import (
    VARIANTS,
    Measured,
    StepModel,
    local_ms,
    state_exchange_us,
)
from based_megatron.bench.rank_parts import cover_rows, gated_sum_rows, part_rows
from based_megatron.bench.rank_steps import graph_rows, step_rows
from based_megatron.bench.report import Case, Check, Row
from based_megatron.bench.scaling_plot import AS_GRAPHS, draw
from based_megatron.bench.slices import check_rows
from based_megatron.bench.timing import Bench
from based_megatron.bench.traffic import LayerTraffic
from based_megatron.errors import ConfigError

__all__ = ["cases", "draw", "facts"]

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
QUICK_LENGTHS = (16, 32)
RANKS = (8, 16, 32, 64, 128, 256, 512)
QUICK_RANKS = (4, 8, 16)
SEQUENCES = (1 << 17, 1 << 23)
"""Tokens of the shortest and the longest sequence whose steps are modelled."""
INTERFERENCE_TOKENS = 16384
LONGEST_REPLAYED = 16384


def cases(bench: Bench) -> list[Case]:
    """What `based bench sequence-parallel` runs. Cases of the model take what the cases before them have measured."""
    links = read_links(bench.links)
    lengths, ranks = (QUICK_LENGTHS, QUICK_RANKS) if bench.quick else (LENGTHS, RANKS)
    if bench.quick and bench.links is None:
        links = dataclasses.replace(links, node_ranks=4)
    sequences = (0, math.inf) if bench.quick else SEQUENCES
    traffic = LayerTraffic.of(model_config(bench))
    found: list[Row] = []

    def measured() -> Measured:
        return Measured(found)

    def keeping(run: Callable[[], Iterable[Row]]) -> Callable[[], list[Row]]:
        def kept() -> list[Row]:
            rows = list(run())
            found.extend(rows)
            return rows

        return kept

    measuring: dict[str, Callable[[], Iterable[Row]]]
    if bench.measured:
        # Read here: files that cannot be used are the user's error, not a case that fails.
        earlier = earlier_rows(bench.measured)
        measuring = {"measured before": lambda: earlier}
    else:
        measuring = {
            "checks": lambda: check_rows(bench),
            **{f"parts L{L}": functools.partial(part_rows, bench, L) for L in lengths},
            "local work": lambda: gated_sum_rows(bench, ranks, links.node_ranks),
        }
        if bench.backend == "triton" and bench.device.type == "cuda":
            measuring["interference"] = lambda: _interference_rows(bench)
        measuring["covers and steps"] = lambda: model_rows(bench, lengths)
        measuring["steps as CUDA graphs"] = lambda: replayed_rows(bench, lengths)
    modelling: dict[str, Callable[[], Iterable[Row]]] = {
        "one layer": lambda: layer_rows(links, traffic, lengths, ranks),
        "one exchange": lambda: exchange_rows(links, traffic, measured(), lengths, ranks),
        "scaling": lambda: scaling_rows(links, traffic, measured(), ranks, bench.seed, sequences),
    }
    return [
        *(Case(name, keeping(run)) for name, run in measuring.items()),
        *(Case(name, functools.partial(_listed, run)) for name, run in modelling.items()),
    ]


def model_rows(bench: Bench, lengths: tuple[int, ...]) -> list[Row]:
    """Covers and whole steps of the model."""
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        size = Row("parameters", "", 1e3 * parameters_in_billions(model), "M")
        covers = itertools.chain.from_iterable(cover_rows(bench, model, L) for L in lengths)
        return [size, *covers, *step_rows(bench, model, lengths)]


def replayed_rows(bench: Bench, lengths: tuple[int, ...]) -> list[Row]:
    """Whole steps as CUDA graphs, of the lengths at which the host may be what bounds them."""
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        return graph_rows(bench, model, [L for L in lengths if L <= LONGEST_REPLAYED])


def layer_rows(links: Links, traffic: LayerTraffic, lengths: tuple[int, ...], ranks: tuple[int, ...]) -> list[Row]:
    """Bytes and times of what one layer sends in one pass, beside other ways to share a sequence."""
    L, heads = lengths[len(lengths) // 2], traffic.heads
    rows = []
    for P in ranks:
        inside, between = traffic.two_level_bytes(P, links.node_ranks)
        many = links.node_ranks < P
        ulysses = "" if heads >= P else f"not possible: {P} ranks, {heads} heads"
        shape = f"P{P} L{L}"
        rows += [
            Row(
                "link time of a linear attention layer's state", shape, state_exchange_us(links, traffic, P, "auto"), "us",
                peers={
                    "all-gather": links.all_gather_us(P, traffic.state_bytes),
                    "two levels": links.two_level_us(P, traffic.state_bytes),
                    "two levels, doubling on rails": links.two_level_us(P, traffic.state_bytes, doubling=True),
                    "chain": links.chain_us(P, traffic.state_bytes),
                    "LASP-2 (273 rows)": links.all_gather_us(P, traffic.unpacked_state_bytes),
                    "Ulysses": ulysses or 2 * links.all_to_all_within_us(P, traffic.linear_all_to_all_bytes(L) / 2),
                },
                rates={
                    "MB all-gather": traffic.all_gather_bytes(P, traffic.state_bytes) / 1e6,
                    "MB two levels, NVLink": inside / 1e6,
                    "MB two levels, network": between / 1e6,
                    "MB chain": traffic.state_bytes / 1e6,
                    "MB LASP-2": traffic.all_gather_bytes(P, traffic.unpacked_state_bytes) / 1e6,
                    "MB Ulysses": (P - 1) / P * traffic.linear_all_to_all_bytes(L) / 1e6,
                },
                source="modelled",
            ),
            Row(
                "link time of a window layer's halo", shape, links.send_us(traffic.window_halo_bytes, many), "us",
                peers={
                    "ring attention": links.ring_attention_us(P, traffic.slice_keys_bytes(L)),
                    "Ulysses": ulysses or 2 * links.all_to_all_within_us(P, traffic.window_all_to_all_bytes(L) / 2),
                },
                rates={
                    "MB halo": traffic.window_halo_bytes / 1e6,
                    "MB ring attention": traffic.ring_attention_bytes(P, L) / 1e6,
                    "MB Ulysses": (P - 1) / P * traffic.window_all_to_all_bytes(L) / 1e6,
                },
                source="modelled",
            ),
            Row(
                "link time of a conv layer's halo", shape, links.send_us(traffic.conv_halo_bytes, many), "us",
                rates={"MB halo": traffic.conv_halo_bytes / 1e6}, source="modelled",
            ),
        ]  # fmt: skip
    return rows


def exchange_rows(
    links: Links, traffic: LayerTraffic, measured: Measured, lengths: tuple[int, ...], ranks: tuple[int, ...]
) -> list[Row]:
    """What a layer's exchange costs a rank beyond its cover, if all ranks are ready at once."""
    rows = []
    for L, P in itertools.product(lengths, ranks):
        many = links.node_ranks < P
        kinds: dict[str, tuple[float, float]] = {
            "state": (
                state_exchange_us(links, traffic, P, "auto") / 1e3,
                local_ms(measured, traffic, P, "auto"),
            ),
            "window": (links.send_us(traffic.window_halo_bytes, many) / 1e3, 0.0),
            "conv": (links.send_us(traffic.conv_halo_bytes, many) / 1e3, 0.0),
        }
        for kind, (link_ms, own_ms) in kinds.items():
            covers = {way: measured.at(f"{kind}: cover {way}", f"L{L}") for way in ("forward", "backward")}
            exposed = {way: max(0.0, link_ms - cover) for way, cover in covers.items()}
            rows.append(
                Row(
                    f"{kind} exchange exposed, forward + backward", f"P{P} L{L}",
                    1e3 * (exposed["forward"] + exposed["backward"]), "us",
                    rates={
                        "us on links each way": 1e3 * link_ms,
                        "us cover forward": 1e3 * covers["forward"],
                        "us cover backward": 1e3 * covers["backward"],
                        "us own work each way": 1e3 * own_ms,
                    },
                    source="modelled",
                )
            )  # fmt: skip
    return rows


def scaling_rows(
    links: Links, traffic: LayerTraffic, measured: Measured, ranks: tuple[int, ...], seed: int,
    sequences: tuple[float, float],
) -> list[Row]:  # fmt: skip
    """Efficiency of whole steps: every length that was measured, with every number of ranks, where S is from .. to so many tokens."""
    shortest, longest = sequences
    models = [
        StepModel(links, traffic, measured, L, P, P)
        for L, P in itertools.product(measured.lengths(), ranks)
        if shortest <= L * P <= longest
    ]
    # Several long sequences at once: eight of a million tokens.
    models += [dataclasses.replace(m, gpus=8 * m.ranks) for m in models if (m.tokens, m.ranks) == (16384, 64)]
    return [_step_row(model, seed) for model in models]


def _step_row(model: StepModel, seed: int) -> Row:
    steps = {variant: model.step_ms(variant, seed) for variant in VARIANTS}
    ours = steps.pop("auto")
    alone_ms, gradients_ms = model.alone_ms, model.gradients_ms
    sharing = "" if model.gpus == model.ranks else f" on {model.gpus} GPUs"
    as_graph = dataclasses.replace(model, as_graph=True)
    graph = {}
    if model.measured.has("step: slice, forward + backward as a CUDA graph", f"L{model.tokens}"):
        graph_ms = as_graph.step_ms("auto", seed) + as_graph.gradients_ms
        graph = {AS_GRAPHS: 100 * as_graph.alone_ms / graph_ms, f"tok/s {AS_GRAPHS[2:]}": 1e3 * model.tokens / graph_ms}
    return Row(
        f"training step, efficiency{sharing}",
        f"P{model.ranks} L{model.tokens}",
        100 * alone_ms / (ours + gradients_ms),
        "%",
        peers={f"{variant}": 100 * alone_ms / (ms + gradients_ms) for variant, ms in steps.items()},
        rates={
            "% without gradients": 100 * alone_ms / ours,
            "% without jitter": 100 * alone_ms / (model.step_ms("auto", seed, jitter=0.0) + gradients_ms),
            **graph,
            "ms of a rank alone": alone_ms,
            "ms for exchanges, own work and jitter": ours - alone_ms,
            "ms gradients exposed": gradients_ms,
            "tok/s a GPU": 1e3 * model.tokens / (ours + gradients_ms),
            "tokens of the sequence": float(model.ranks * model.tokens),
        },
        source="modelled",
    )


def facts(bench: Bench) -> dict[str, str]:
    """What else a reader must know: the links, and where measured times came from if not from this run."""
    said = {"links": str(bench.links or "defaults of bench/links.py")}
    if not bench.measured:
        return said
    reports = [_read(path)["facts"] for path in bench.measured]
    kept = {key: reports[0][key] for key in ("device", "dtype", "backend", "python", "packages") if key in reports[0]}
    return {**kept, "measured by": "; ".join(facts.get("measured by", facts["command"]) for facts in reports), **said}


def earlier_rows(paths: Sequence[Path]) -> list[Row]:
    """The measured rows of earlier runs; what a later one has measured again replaces that of one before.

    Raises ConfigError if there are none, or if they are of different devices.
    """
    reports = {path: _read(path) for path in paths}
    devices = {report["facts"]["device"] for report in reports.values()}
    if len(devices) > 1:
        raise ConfigError(f"--measured: files of different devices, {', '.join(sorted(devices))}: give files of one")
    rows = {
        (row["work"], row["shape"]): dataclasses.replace(
            Row(**{key: row[key] for key in ("work", "shape", "value", "unit", "rates", "source", "note")}),
            checks={name: Check(check["error"], check["limit"]) for name, check in row["checks"].items()},
        )
        for report in reports.values()
        for row in report["rows"]
        if (row["source"] == "measured" or row["work"].startswith("step: ")) and not row["failure"]
    }
    if not rows:
        raise ConfigError(f"--measured {paths[0]} has no measured rows: change --measured to the JSON of a whole run")
    return list(rows.values())


def _read(path: Path) -> dict[str, Any]:
    wrong = f"--measured {path} is not the JSON of `based bench sequence-parallel`: give what a run has written"
    try:
        report = json.loads(path.read_text())
        known = {"device", "command"} <= set(report["facts"]) and all("source" in row for row in report["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{wrong} ({type(error).__name__}: {error})") from error
    if not known:
        raise ConfigError(wrong)
    return report


def _interference_rows(bench: Bench) -> list[Row]:
    # Triton is there on machines with a GPU only.
    from based_megatron.bench.interference import interference_rows

    return interference_rows(bench, bench.size(INTERFERENCE_TOKENS, QUICK_LENGTHS[-1]))


def _listed(run: Callable[[], Iterable[Row]]) -> list[Row]:
    return list(run())
