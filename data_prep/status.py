"""`based prep status OUTPUT`: how far the work on an output is, from what is on disk."""

import time
from dataclasses import dataclass
from pathlib import Path

from based_megatron.data.manifest import MANIFEST_NAME, load_manifest
from based_megatron.data_prep.output import resolved_output, units_of, workplace_of
from based_megatron.data_prep.progress import Plan, load_plan
from based_megatron.data_prep.unit_store import FinishedUnit, read_unit
from based_megatron.errors import DataError
from based_megatron.run_folder.lock import is_gone, read_owner


@dataclass(frozen=True)
class FirstPass:
    """The units of a plan, as far as they are finished."""

    plan: Plan
    finished: tuple[FinishedUnit, ...]
    new_bytes: int
    """Bytes of those that were finished since the start."""
    seconds: float
    """Seconds since the start."""

    @property
    def finished_bytes(self) -> int:
        """Bytes of the pieces of finished units."""
        return sum(unit.bytes for unit in self.finished)

    @property
    def bytes_per_second(self) -> float:
        """Bytes of the inputs that all tasks together have read in a second."""
        return self.new_bytes / self.seconds if self.seconds > 0 else 0.0


def first_pass(folder: Path, now: float) -> FirstPass | None:
    """How far the units in a folder of finished work are at a time; None if no start has come to them."""
    plan = load_plan(folder)
    if plan is None:
        return None
    places = [folder / "units" / key for key, _ in plan.units]
    found = [(place, unit) for place in places if (unit := read_unit(place)) is not None]
    new_bytes = sum(unit.bytes for place, unit in found if place.stat().st_mtime >= plan.begun)
    return FirstPass(plan, tuple(unit for _, unit in found), new_bytes, now - plan.begun)


def status_of(path: str, now: float | None = None) -> str:
    """A few lines about an output. Raises DataError if nothing is known of it."""
    output = resolved_output(path)
    lines = [f"{path}: {_owner(output)}"]
    if (output / MANIFEST_NAME).is_file():
        splits = load_manifest(output).splits.items()
        made = ", ".join(f"{name} {split.documents:,} documents, {split.tokens:,} tokens" for name, split in splits)
        lines.append(f"corpus: {made}")
    units = first_pass(units_of(output), time.time() if now is None else now)
    if units is not None:
        lines += _first_pass_lines(units, running=read_owner(workplace_of(output)) is not None)
    if len(lines) == 1 and not workplace_of(output).is_dir():
        raise DataError(f"there is no corpus at {path}, and no `based prep` has begun one: check the name")
    return "\n".join(lines)


def _first_pass_lines(units: FirstPass, running: bool) -> list[str]:
    plan = units.plan
    tokens = sum(split.tokens for unit in units.finished for split in unit.splits.values())
    lines = [
        f"units: {len(units.finished):,} of {len(plan.units):,} finished, {units.finished_bytes / 1e6:,.1f} of "
        f"{plan.bytes / 1e6:,.1f} MB, {tokens / 1e6:,.1f} Mtok"
    ]
    if running and units.bytes_per_second and len(units.finished) < len(plan.units):
        left_seconds = (plan.bytes - units.finished_bytes) / units.bytes_per_second
        lines.append(
            f"rate: {units.bytes_per_second / 1e6:,.2f} MB/s over {plan.tasks} tasks; {left_seconds / 60:,.0f} min left"
        )
    return lines


def _owner(output: Path) -> str:
    owner = read_owner(workplace_of(output))
    if owner is None:
        return "no `based prep` is at work"
    return f"{owner} {'was at work, and is gone: start it again to go on' if is_gone(owner) else 'is at work'}"
