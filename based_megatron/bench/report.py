"""Rows of a benchmark, and the JSON that holds them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from based_megatron.bench.keys import Baseline, Method, Operation, Passes, Quantity, Sizes
from based_megatron.bench.timing import Bench, Timing

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "fla-core",
    "liger-kernel",
    "flash-attn",
    "causal-conv1d",
)


@dataclass(frozen=True)
class Target:
    """The bound that a measured value should keep."""

    kind: Literal["at most", "at least"]
    value: float

    def met(self, measured: float) -> bool:
        return measured <= self.value if self.kind == "at most" else measured >= self.value


@dataclass(frozen=True)
class Check:
    """An error and the largest that passes. NaN never passes."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class Row:
    """A measured value with its target, its baselines and its errors."""

    operation: Operation
    value: float
    quantity: Quantity = Quantity.MILLISECONDS
    """The quantity that `value`, `floor`, `target` and the baselines are."""
    passes: Passes | None = None
    sizes: Sizes = field(default_factory=Sizes)
    model: str = ""
    """Preset, where a whole model is measured."""
    method: Method | None = None
    """The way in which the time was taken, where the value is one call's."""
    target: Target | None = None
    floor: float | None = None
    """The value that the device cannot beat."""
    baselines: Mapping[Baseline, Timing | float | str] = field(default_factory=dict)
    """The baseline's value, or why there is none."""
    checks: Mapping[str, Check] = field(default_factory=dict)
    """Error of each output and gradient against fp64, by the tensor's name."""
    rates: Mapping[Quantity, float] = field(default_factory=dict)
    """Other measures."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks.values())


@dataclass(frozen=True)
class Failure:
    """A case that raised."""

    case: str
    error: str

    @classmethod
    def of(cls, case: str, error: Exception) -> Failure:
        return cls(case, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


@dataclass(frozen=True)
class Report:
    """Everything that a run has measured."""

    name: str
    """The benchmark that ran, such as `kernels`."""
    facts: Mapping[str, str]
    """Facts that a reader needs to repeat the numbers."""
    rows: Sequence[Row] = ()
    failures: Sequence[Failure] = ()

    def to_json(self) -> str:
        """Text of the JSON file."""
        return json.dumps(plain(self), indent=1) + "\n"


@dataclass(frozen=True)
class Case:
    """Rows that are measured together; one that raises does not stop the others."""

    name: str
    run: Callable[[], Row | Sequence[Row]]

    def outcome(self) -> Sequence[Row] | Failure:
        """The rows, or why there are none."""
        try:
            found = self.run()
        except Exception as error:
            traceback.print_exc()
            return Failure.of(self.name, error)
        return [found] if isinstance(found, Row) else found


def relative_error(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected values, in fp64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def facts_of(bench: Bench, command: str) -> dict[str, str]:
    """Device, versions and command of a run."""
    versions = [f"{package} {version}" for package in PACKAGES if (version := version_of(package))]
    on_gpu = bench.device.type == "cuda"
    return {
        "device": device_name(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "backend": bench.backend,
        "python": platform.python_version(),
        "packages": ", ".join(versions) + (f", CUDA {torch.version.cuda}" if on_gpu else ""),
        "command": command,
        **({"sizes": "tiny (--quick): the times mean nothing"} if bench.quick else {}),
    }


def plain(value: Any) -> Any:
    """JSON values of dataclasses and keys: fields that hold their default are left out, numbers that are not finite are strings."""
    if dataclasses.is_dataclass(value):
        pairs = ((each, getattr(value, each.name)) for each in dataclasses.fields(value))
        return {each.name: plain(found) for each, found in pairs if not _is_default(each, found)}
    if isinstance(value, Mapping):
        return {str(key): plain(found) for key, found in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(found) for found in value]
    return value


def _is_default(each: dataclasses.Field[Any], found: Any) -> bool:
    if each.default_factory is not dataclasses.MISSING:
        return bool(found == each.default_factory())
    return each.default is not dataclasses.MISSING and bool(found == each.default)


def device_name(device: torch.device) -> str:
    """A device as tables name it, a CPU with its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def version_of(package: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
