"""Results of `python -m benchmarks.sequence_parallel`, measured and modelled: typed rows, and the JSON that holds them.

Names: length_tokens is L, the tokens of a rank's slice; ranks is P, that share a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter

from based_megatron.bench.keys import Key, Method, Passes, Sizes
from based_megatron.bench.report import Check, Failure, plain
from based_megatron.errors import ConfigError


class Layer(Key):
    """A layer with an exchange, by its mixer."""

    LINEAR_ATTENTION = "linear_attention", "linear attention"
    SLIDING_WINDOW = "sliding_window", "window"
    GATED_CONV = "gated_conv", "conv"


LAYERS = {"L": Layer.LINEAR_ATTENTION, "S": Layer.SLIDING_WINDOW, "c": Layer.GATED_CONV}
"""Layers by their letters in a layer pattern."""


class Part(Key):
    """A piece of a layer's computation on one rank."""

    KEY_VALUE_PROJECTION = "key_value_projection", "key and value projection"
    SEGMENT_STATE = "segment_state", "segment state"
    QUERY_PROJECTION = "query_projection", "query projection"
    OUTPUTS = "outputs", "outputs given a state"
    OUTPUT_GRADIENTS = "output_gradients", "output gradients"
    ADJOINT_SEGMENT_STATE = "adjoint_segment_state", "adjoint segment state"
    DQ = "dq", "dq"
    DK_DV = "dk_dv", "dk and dv given an adjoint state"
    BOUNDARY_PROJECTION = "boundary_projection", "boundary projection"
    PROJECTION = "projection", "projection"
    FORWARD = "forward", "forward"
    BACKWARD = "backward", "backward"


class Way(Key):
    """Ways of ranks to share what a layer needs. From `TWO_LEVEL_DOUBLING` on they are modelled for comparison; we have none of them."""

    HALO = "halo", "halo"
    AUTO = "auto", "auto"
    ALL_GATHER = "all_gather", "all_gather"
    TWO_LEVEL = "two_level", "two_level"
    CHAIN = "chain", "chain"
    TWO_LEVEL_DOUBLING = "two_level_doubling", "two_level with doubling"
    LASP2 = "lasp2", "LASP-2"
    ULYSSES = "ulysses", "Ulysses"
    RING_ATTENTION = "ring_attention", "ring attention"


class Sharing(Key):
    """The work of a measured step."""

    WHOLE = "whole_sequence", "whole sequence"
    SLICE = "slice", "slice"


class CoveringKernel(Key):
    """A kernel that runs while an exchange is under way."""

    QUERY_PROJECTION = "query_projection", "query projection"
    DQ = "dq", "dq"
    WINDOW_PROJECTION = "window_projection", "window projection"


@dataclass(frozen=True)
class SliceCheck:
    """Errors of a layer's operation over slices, of all ranks together."""

    layer: Layer
    way: Way
    ranks: int
    sizes: Sizes
    checks: Mapping[str, Check]
    sent_kilobytes: float
    """Largest amount that one rank sent, in both passes."""

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.layer, self.way, self.ranks, self.sizes


@dataclass(frozen=True)
class PartTime:
    """Time of one piece of a layer on a rank."""

    layer: Layer
    part: Part
    length_tokens: int
    ms: float
    method: Method

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.layer, self.part, self.length_tokens


@dataclass(frozen=True)
class CoverTime:
    """Time between the start of a layer's exchange and the wait for it."""

    layer: Layer
    passes: Passes
    length_tokens: int
    ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.layer, self.passes, self.length_tokens


@dataclass(frozen=True)
class LocalWork:
    """The computation of a rank for the exchange of one state: packing, and sums over what has come."""

    way: Way
    ranks: int
    ms: float
    method: Method

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.way, self.ranks


@dataclass(frozen=True)
class Slowdown:
    """Time of a kernel while a copy runs, over its time alone."""

    kernel: CoveringKernel
    length_tokens: int
    channels: int
    ratio: float
    copied_gigabytes_per_second: float
    alone_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.kernel, self.length_tokens, self.channels


@dataclass(frozen=True)
class StepTime:
    """One training step of a rank: whole sequence, or slice of a longer one."""

    sharing: Sharing
    passes: Passes
    length_tokens: int
    ms: float
    as_graph: bool = False
    """Replayed as one CUDA graph; else launched one by one."""
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    recomputed: bool = False
    """True if all activations are recomputed."""
    extrapolated_from_tokens: int | None = None
    """Length whose time this is in proportion to, where the step does not fit the device."""

    @property
    def key(self) -> tuple[object, ...]:
        """The case that was measured, without its result."""
        return self.sharing, self.passes, self.length_tokens, self.as_graph


@dataclass(frozen=True)
class Measured:
    """Measurements of one device."""

    parameters_millions: float | None = None
    checks: Sequence[SliceCheck] = ()
    parts: Sequence[PartTime] = ()
    local_work: Sequence[LocalWork] = ()
    slowdowns: Sequence[Slowdown] = ()
    covers: Sequence[CoverTime] = ()
    steps: Sequence[StepTime] = ()

    def cover_ms(self, layer: Layer, passes: Passes, length_tokens: int) -> float:
        found = (cover.ms for cover in self.covers if cover.key == (layer, passes, length_tokens))
        return _only(found, f"cover of {layer.label}, {passes.label}, L{length_tokens}")

    def local_work_ms(self, way: Way, ranks: int) -> float:
        found = (work.ms for work in self.local_work if work.key == (way, ranks))
        return _only(found, f"local work, {way.label}, P{ranks}")

    def step_ms(self, sharing: Sharing, passes: Passes, length_tokens: int, as_graph: bool = False) -> float:
        found = (step.ms for step in self.steps if step.key == (sharing, passes, length_tokens, as_graph))
        return _only(found, f"step, {sharing.label}, {passes.label}, L{length_tokens}")

    def parameters(self) -> float:
        """Number of the model's parameters."""
        return 1e6 * _only((x for x in (self.parameters_millions,) if x is not None), "number of parameters")

    def lengths(self, as_graph: bool = False) -> list[int]:
        """Lengths L whose steps of a slice were measured."""
        wanted = (Sharing.SLICE, Passes.BOTH, as_graph)
        return sorted(s.length_tokens for s in self.steps if (s.sharing, s.passes, s.as_graph) == wanted)

    def slowdown(self, kernel: CoveringKernel, gigabytes_per_second: float) -> float:
        """Ratio at the copy's rate that is closest to that of a link; 1 if it was not measured."""
        found = [each for each in self.slowdowns if each.kernel is kernel]
        closest = min(found, key=lambda s: abs(s.copied_gigabytes_per_second - gigabytes_per_second), default=None)
        return 1.0 if closest is None else max(1.0, closest.ratio)

    def joined(self, later: Measured) -> Measured:
        """Both; what `later` has measured again replaces what is here."""
        millions = self.parameters_millions if later.parameters_millions is None else later.parameters_millions
        names = [each.name for each in fields(self) if each.name != "parameters_millions"]
        rows = {name: {row.key: row for row in (*getattr(self, name), *getattr(later, name))} for name in names}
        return Measured(millions, **{name: tuple(of_name.values()) for name, of_name in rows.items()})


@dataclass(frozen=True)
class LinkCost:
    """The bytes that one layer sends in one pass, and how long that takes on the links if all ranks are ready at once."""

    layer: Layer
    way: Way
    ranks: int
    length_tokens: int
    us: float | None = None
    megabytes: float | None = None
    """Sent by a rank; inside its node, where network_megabytes leave it."""
    network_megabytes: float | None = None
    obstacle: str = ""
    """Why there is no time."""


@dataclass(frozen=True)
class ExposedExchange:
    """Microseconds of a layer's exchanges, forward and backward together, that are not hidden."""

    layer: Layer
    ranks: int
    length_tokens: int
    exposed_us: float
    link_us: float
    cover_forward_us: float
    cover_backward_us: float
    own_work_us: float
    """The computation of the rank for one exchange."""


@dataclass(frozen=True)
class ScaledStep:
    """A training step of many ranks: the time of the same tokens on a rank alone, in percent of the step's."""

    ranks: int
    length_tokens: int
    gpus: int
    """Ranks of all sequences together, which reduce gradients."""
    efficiency_percent: Mapping[Way, float]
    percent_without_gradients: float
    percent_without_jitter: float
    alone_ms: float
    exchanges_ms: float
    """Exchanges, the work for them, and jitter."""
    gradients_exposed_ms: float
    tokens_per_second: float
    """Tokens per second of one GPU."""
    percent_as_graph: float | None = None
    tokens_per_second_as_graph: float | None = None

    @property
    def sequence_tokens(self) -> int:
        return self.ranks * self.length_tokens


@dataclass(frozen=True)
class Modelled:
    """Results that follow from measured times and assumed links."""

    links: Sequence[LinkCost] = ()
    exchanges: Sequence[ExposedExchange] = ()
    steps: Sequence[ScaledStep] = ()

    def joined(self, later: Modelled) -> Modelled:
        """Both, one after the other."""
        return Modelled((*self.links, *later.links), (*self.exchanges, *later.exchanges), (*self.steps, *later.steps))


@dataclass(frozen=True)
class Results:
    """Everything that a run has found."""

    facts: Mapping[str, str]
    measured: Measured
    modelled: Modelled
    failures: Sequence[Failure] = ()

    def to_json(self) -> str:
        return json.dumps(plain(self), indent=1) + "\n"

    def failed(self) -> list[str]:
        """Errors of cases, by name."""
        wrong = [c for c in self.measured.checks if not all(check.passed for check in c.checks.values())]
        names = [f"{c.layer.label} over slices, {c.way.label}, P{c.ranks} {c.sizes}" for c in wrong]
        return names + [failure.case for failure in self.failures]


def read_results(path: Path) -> Results:
    """Results of an earlier run. Raises ConfigError if the file is something else."""
    try:
        return TypeAdapter(Results).validate_python(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not the JSON of `python -m benchmarks.sequence_parallel`: {reason}") from error


def _only(found: Iterable[float], name: str) -> float:
    """The single value. Raises KeyError if there is none."""
    for value in found:
        return value
    raise KeyError(f"{name}: not measured in this run; drop --only, or give --measured FILE")
