"""One call of `based recall`: choose points, sweep, write."""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping

import torch

from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend
from based_megatron.recall.cli import RecallConfig
from based_megatron.recall.figure import write
from based_megatron.recall.presets import FAITHFUL_EPOCHS, PRESETS, Preset
from based_megatron.recall.sweep import Setup, Sweep, check, jobs_of, locked
from based_megatron.recall.systems import SYSTEMS, Point, in_order_of_interest, outside_points, pattern_points

WORKERS_OF_A_GPU = 4


def study(config: RecallConfig, command: str) -> int:
    """Run what is chosen and write the results of the folder; returns 1 if a run failed. Raises ConfigError."""
    device = _device(config.device)
    resolve_backend(config.backend, torch.device(device))
    name = config.preset if config.preset != "auto" else ("figure" if device == "cuda" else "tiny")
    preset = _preset(name, config)
    points = _points(config, name, preset)
    check(points, preset.task)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if device == "cuda" else ("cpu",)
    workers = config.workers or (WORKERS_OF_A_GPU * len(devices) if device == "cuda" else cores)
    deadline = time.time() + 60 * config.minutes if config.minutes else None
    setup = Setup(preset, devices, config.backend, max(1, cores // workers), deadline, config.compile)
    with locked(config.output):
        sweep = Sweep(config.output, setup, workers, jobs_of(points, preset, config.seeds))
        try:
            sweep.run()
        finally:
            # What has been measured is shown, whatever ends the sweep.
            print(*write(config.output, name, preset, command), sep="\n", flush=True)
    if sweep.unfinished:
        print(f"{sweep.unfinished} of {len(sweep.jobs)} runs are left: the same command goes on with them", flush=True)
    if sweep.failures:
        print(f"based recall: failed: {'; '.join(sweep.failures)}", file=sys.stderr)
    return 1 if sweep.failures else 0


def _device(requested: str) -> str:
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no GPU here; set --device cpu")
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


def _preset(name: str, config: RecallConfig) -> Preset:
    """The preset, with what the command line changes of it."""
    preset = PRESETS[name]
    task, recipe = dataclasses.replace(preset.task, fresh=config.fresh), preset.recipe
    if config.faithful:
        recipe = dataclasses.replace(recipe, ordered=True, epochs=FAITHFUL_EPOCHS, stages=())
    if config.epochs:
        kept = tuple(stage for stage in recipe.stages if stage.until_epoch < config.epochs)
        recipe = dataclasses.replace(recipe, epochs=config.epochs, stages=kept)
    return Preset(task, recipe)


def _points(config: RecallConfig, preset_name: str, preset: Preset) -> list[Point]:
    """The points that are chosen, in the order in which they run. Raises ConfigError if there are none."""
    vocab = preset.task.vocab_size
    outside = outside_points(config.mixers, config.mixer_options, preset_name, vocab) if config.mixers else {}
    known = {name: [make(vocab) for make in getattr(system, preset_name)] for name, system in SYSTEMS.items()} | outside
    groups = [
        pattern_points(pattern, config.mixers, config.mixer_options, preset_name, vocab) for pattern in config.pattern
    ]
    names = [name.strip() for name in config.systems.split(",") if name.strip()]
    if not names and not config.pattern:
        names = list(outside or known)
    groups += [known[name] for name in _known(names, known)]
    points = [point for point in in_order_of_interest(groups) if config.only in point.name]
    if not points:
        every = ", ".join(point.name for group in groups for point in group)
        raise ConfigError(
            f"--only {config.only!r} is in no point of this choice ({every or 'which is empty'}); change --only"
        )
    return points


def _known(names: list[str], known: Mapping[str, list[Point]]) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"--systems names {name!r}, which is none of {', '.join(known)}; change --systems")
    return names
