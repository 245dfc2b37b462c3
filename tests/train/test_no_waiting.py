"""In steps that log nothing the host reads nothing from the device: it would wait for all that is queued there."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import based_megatron
from based_megatron.train.trainer import Trainer
from support.runs import train_in_pool

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
PACKAGE = str(Path(based_megatron.__file__).parent)
HOST_TENSORS = (
    "data/", "parallel/sequence/", "train/stop.py", "checkpoint/ranks.py", "train/optimizer/adamw.py", "kernels/square_sum/reference.py",
    "parallel/transfer.py",
)  # fmt: skip
"""Files whose tensors live on the host: documents, plans of slices, the votes of the hosts on stops and saves, counts of optimizer
steps, ranges of flat tensors; and the one copy that the host waits for in each step, whether it counts, while the update runs."""


def reader(frame: FrameType | None) -> str:
    """The file and line that read: the first outside of torch, if it is ours."""
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(PACKAGE):
        return ""
    name = frame.f_code.co_filename.removeprefix(PACKAGE + "/")
    return "" if name.startswith(HOST_TENSORS) else f"{name}:{frame.f_code.co_name}"


def reads_by_step(*job: Any) -> dict[int, list[str]]:
    """Who of ours has read tensors from a step's beginning to that of the next one."""
    reads: dict[int, list[str]] = {}
    take_step = Trainer._take_step

    def counted(trainer: Trainer, batches: Any) -> Any:
        reads[trainer.step + 1] = []
        return take_step(trainer, batches)

    def watched(name: str) -> Any:
        real = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if reads and (who := reader(sys._getframe(1))):
                reads[max(reads)].append(who)
            return real(tensor, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_take_step", counted)
        for name in READS:
            patch.setattr(Tensor, name, watched(name))
        train_in_pool(*job)
    return reads


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ("--parallel.tensor", "2")),
        (2, ("--parallel.pipeline", "2")),
        (2, ("--parallel.zero-stage", "3")),
        (2, ("--train.precision", "bf16", "--guards.spike", "record")),
        (2, ("--data.carry-state", "--model.layer-pattern", "cLS", "--parallel.context", "2")),
    ],
    ids=["single", "tensor", "pipeline", "zero 3", "recorded spikes", "carried"],
)
def test_only_log_points_read(worker_pool, corpus, tmp_path, world_size, overrides):
    job = (
        "--monitor.log-interval-steps", "4", "--checkpoint.interval-steps", "0", "--validation.interval-steps", "0",
        "--guards.warmup-steps", "2", "--guards.window-steps", "4", *overrides,
    )  # fmt: skip
    for reads in worker_pool(world_size).run(reads_by_step, tmp_path, corpus, *job):
        assert {step for step, who in reads.items() if who} == {1, 4, 8}, reads
        assert sorted(reads) == list(range(1, 9))


def test_a_read_is_noticed():
    """A read counts if our code asks for it, directly or through torch, but not if a library does."""
    calls: dict[str, Any] = {}
    exec(compile("def ours(f): return f()", f"{PACKAGE}/train/step.py", "exec"), calls)
    exec(compile("def library(f): return f()", "/site-packages/deepspeed/engine.py", "exec"), calls)

    def frame() -> FrameType:
        return sys._getframe(1)

    assert calls["ours"](lambda: reader(frame().f_back)) == "train/step.py:ours"
    assert calls["ours"](lambda: calls["library"](lambda: reader(frame().f_back))) == ""
    assert torch.zeros(()).item() == 0
