"""Saves that are written while training goes on: what they hold, what becomes of their errors, and how much memory they take."""

import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from ckpt_engines import run_cases
from ckpt_fragments import flat, full_tensors, shard

from based_megatron.checkpoint import host_memory, saver
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.host_memory import HostCopy, available_bytes, copy_bytes
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.ranks import ALONE, Ranks, all_ranks
from based_megatron.checkpoint.saver import Saver
from based_megatron.checkpoint.store import Kept, list_checkpoints, newest_valid

CPU = torch.device("cpu")


def make_saver(folder: Path, fragments: list[Fragment], kept: Kept = Kept(), ranks: Ranks = ALONE) -> Saver:  # noqa: B008
    """One that saves in the background."""
    made = Saver(folder, kept, ranks, ranks, CPU)
    assert made.take_memory(fragments) == ""
    return made


def values(fragments: list[Fragment]) -> list[torch.Tensor]:
    return [tensor for fragment in fragments for _, tensor in sorted(fragment.tensors.items())]


def loaded(path: Path) -> list[torch.Tensor]:
    fragments = shard(None, 1, 1)[0]
    load_checkpoint(path, fragments, ranks=ALONE)
    return values(fragments)


def expected(seed: int) -> list[torch.Tensor]:
    return values(shard(full_tensors(seed), 1, 1)[0])


def test_a_save_holds_the_values_of_its_step_though_training_goes_on(tmp_path, monkeypatch):
    """The thread is held until training has overwritten everything, and has begun and finished no other save."""
    fragments, trained = shard(full_tensors(1), 1, 1)[0], threading.Event()
    save_checkpoint = saver.save_checkpoint

    def held(*args: Any) -> Path:
        assert trained.wait(60)
        return save_checkpoint(*args)

    monkeypatch.setattr(saver, "save_checkpoint", held)
    made = make_saver(tmp_path, fragments)
    made.start(1, fragments, {}, prunes=False)
    made.hold_update()
    for tensor in values(fragments):
        tensor.fill_(7.0)
    assert made.in_flight and not made.finished()
    trained.set()
    saved = made.finish()
    assert saved.error == "" and not made.in_flight
    assert all(torch.equal(a, b) for a, b in zip(loaded(saved.path), expected(1), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_updates_after_the_copy_and_not_before(tmp_path):
    """With a copy that takes long, work behind it, and memory that is given back meanwhile."""
    device = torch.device("cuda")
    large = torch.arange(2.0**28, device=device)
    before = large.cpu()  # above 2^24 a GPU rounds its steps otherwise than a CPU
    spec = host_memory.Fragment(shard(None, 1, 1)[0][0].spec, 0, large.numel(), {"model": large})
    copy = HostCopy(device)
    copy.allocate([spec])
    (copied,) = copy.copy([spec])
    copy.hold()
    large.fill_(-1.0)
    del spec
    copy.wait()
    assert torch.equal(copied.tensors["model"], before)
    assert copied.tensors["model"].is_pinned()


def test_the_host_memory_of_a_copy_is_taken_once_and_is_as_large_as_told():
    fragments = shard(full_tensors(1), 1, 2)[0]
    fragments[0] = Fragment(
        fragments[0].spec, fragments[0].start, fragments[0].numel, fragments[0].tensors, owned=False
    )
    copy = HostCopy(CPU)
    copy.allocate(fragments)
    first = copy.copy(fragments)
    again = copy.copy(fragments)
    assert [a.data_ptr() for a in values(first)] == [b.data_ptr() for b in values(again)]
    assert copy_bytes(fragments) == sum(tensor.untyped_storage().nbytes() for tensor in values(first))
    assert len(first) == len(fragments) - 1, "another rank writes the copy"
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(fragments[1:]), strict=True))


def test_tensors_of_another_size_get_memory_of_their_own():
    """Carried states of another micro batch, say."""
    spec = shard(None, 1, 1)[0][0].spec
    copy = HostCopy(CPU)
    for numel, dtype in ((6, torch.float32), (12, torch.float32), (12, torch.bfloat16), (0, torch.float32)):
        tensor = torch.arange(numel).to(dtype)
        (copied,) = copy.copy([Fragment(spec, 0, numel, {"carried": tensor})])
        assert copied.tensors["carried"].dtype == dtype and torch.equal(copied.tensors["carried"], tensor)


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    """That of a job, though its step has none; files that are cached count as free."""
    step = tmp_path / "job" / "step"
    step.mkdir(parents=True)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    own = Path.read_text

    def read_text(path: Path, *args: Any) -> str:
        return "0::/job/step\n" if str(path) == "/proc/self/cgroup" else own(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    (step / "memory.max").write_text("max\n")
    assert available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (step.parent / "memory.max").write_text("5000\n")
    (step.parent / "memory.current").write_text("3000\n")
    (step.parent / "memory.stat").write_text("active_file 1\ninactive_file 500\n")
    assert available_bytes() == 2500
    (step.parent / "memory.current").write_text("9000\n")
    assert available_bytes() == 0


def test_a_host_without_room_for_the_copies_of_its_ranks_saves_as_before(tmp_path, monkeypatch):
    fragments = flat(shard(full_tensors(1), 1, 1))
    made = Saver(tmp_path, Kept(), ALONE, ALONE, CPU)
    monkeypatch.setattr(saver, "available_bytes", lambda: copy_bytes(fragments) - 1)
    assert "host memory" in made.take_memory(fragments) and not made.asynchronous
    made.start(1, fragments, {}, prunes=False)
    saved = made.finish()
    assert saved.copy_seconds == 0 and all(
        torch.equal(a, b) for a, b in zip(loaded(saved.path), expected(1), strict=True)
    )
    monkeypatch.setattr(saver, "available_bytes", lambda: copy_bytes(fragments))
    assert made.take_memory(fragments) == "" and made.asynchronous


def test_memory_that_cannot_be_taken_ends_no_run(tmp_path, monkeypatch):
    fragments = flat(shard(full_tensors(1), 1, 1))

    def refuse(copy: HostCopy, fragments: list[Fragment]) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(HostCopy, "allocate", refuse)
    made = make_saver(tmp_path, fragments)
    assert "Cannot allocate memory" in made.start(1, fragments, {}, prunes=False)
    assert made.finish().error == "" and not made.asynchronous
    assert made.start(2, fragments, {}, prunes=False) == ""
    made.finish()


def test_an_error_of_the_thread_is_told_once_and_the_next_save_works(tmp_path, monkeypatch):
    fragments = flat(shard(full_tensors(1), 1, 1))
    made = make_saver(tmp_path, fragments)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_checkpoint", lambda *args: (_ for _ in ()).throw(RuntimeError("two\nlines")))
        made.start(1, fragments, {}, prunes=True)
        assert made.finish().error == f"step 1 was not saved to {tmp_path}: RuntimeError: two lines"
    made.start(2, fragments, {}, prunes=True)
    assert made.finish().error == "" and len(list_checkpoints(tmp_path)) == 1


def test_older_checkpoints_stay_until_the_new_one_is_whole(tmp_path, monkeypatch):
    fragments = flat(shard(full_tensors(1), 1, 1))
    made = make_saver(tmp_path, fragments, Kept(last=1))
    made.start(1, fragments, {}, prunes=True)
    first = made.finish().path
    rename = os.rename

    def failing(a: Path, b: Path) -> None:
        if Path(b).name == "step-00000002":
            raise OSError(28, "No space left on device")
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        made.start(2, fragments, {}, prunes=True)
        assert "No space left" in made.finish().error
    assert list_checkpoints(tmp_path) == [first] and newest_valid(tmp_path, pytest.fail) == first
    made.start(3, fragments, {}, prunes=True)
    third = made.finish().path
    assert list_checkpoints(tmp_path) == [third]


def two_groups() -> tuple[Ranks, Ranks]:
    return all_ranks(dist.new_group(backend="gloo")), all_ranks(dist.new_group(backend="gloo"))


def case_collectives_of_training_go_on(folder: Path) -> None:
    """Rank 1's thread is late; meanwhile both main threads use the other group, and agree that nothing has ended."""
    rank = dist.get_rank()
    ranks, writers = two_groups()
    fragments = shard(full_tensors(1), 1, 2)[rank]
    made, trained = Saver(folder, Kept(), ranks, writers, CPU), threading.Event()
    assert made.take_memory(fragments) == ""
    together = Ranks.together

    def late(self: Ranks, action: Any) -> Any:
        if self is writers and rank == 1:
            assert trained.wait(60)
        return together(self, action)

    Ranks.together = late  # type: ignore[method-assign]
    try:
        made.start(1, fragments, {}, prunes=False)
        for step in range(20):
            assert ranks.together(lambda step=step: step) == [step, step]
            assert not made.finished()
        trained.set()
        saved = made.finish()
    finally:
        Ranks.together = together  # type: ignore[method-assign]
    assert saved.error == "" and newest_valid(folder, pytest.fail, ranks) == saved.path


def case_one_rank_fails(folder: Path) -> None:
    """The other rank, whose save worked, takes it for failed too."""
    rank = dist.get_rank()
    ranks, writers = two_groups()
    fragments = shard(full_tensors(1), 1, 2)[rank]
    made = Saver(folder, Kept(), ranks, writers, CPU)
    assert made.take_memory(fragments) == ""
    save_checkpoint = saver.save_checkpoint

    def fails_after(*args: Any) -> Path:
        path = save_checkpoint(*args)
        if rank == 1:
            raise RuntimeError("lost")
        return path

    saver.save_checkpoint = fails_after  # type: ignore[assignment]
    try:
        made.start(1, fragments, {}, prunes=False)
        error = made.finish().error
    finally:
        saver.save_checkpoint = save_checkpoint
    assert ("rank 1: RuntimeError: lost" if rank == 1 else "another rank failed") in error, error


def test_two_ranks(tmp_path):
    cases = [
        (case.__name__, case, (tmp_path / case.__name__,))
        for case in (case_collectives_of_training_go_on, case_one_rank_fails)
    ]
    assert run_cases(cases, tmp_path) == {name: "" for name, _, _ in cases}
