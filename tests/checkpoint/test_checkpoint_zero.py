"""Checkpoints of DeepSpeed engines: every ZeRO stage, resharding between layouts, failures on one of several ranks.

All cases run in one pair of processes, started once.
"""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ckpt_engines import Layout, make_alone, make_engine, run_cases, train

from based_megatron.checkpoint.full import read_full
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import newest_valid
from based_megatron.checkpoint.zero import after_load, optimizer_entry, saved_optimizer, zero_fragments
from based_megatron.config import Config, to_dict
from based_megatron.errors import CheckpointError
from based_megatron.parallel.deepspeed import ZeroEngine
from based_megatron.parallel.partitions import Partition
from based_megatron.train.optimizer.adamw import Optimizer


def save(engine, folder: Path, step: int) -> Path:
    return save_checkpoint(
        folder, step, zero_fragments(engine), {"optimizer": optimizer_entry(engine), "config": to_dict(Config())}
    )


def load(engine, path: Path, weights_only: bool = False) -> None:
    state = load_checkpoint(path, zero_fragments(engine), weights_only)
    after_load(engine, None if weights_only else saved_optimizer(state))


def adam_steps(engine) -> int:
    return engine.optimizer.scalars()["step"]


def held(engine) -> list[torch.Tensor]:
    return [tensor.clone() for fragment in zero_fragments(engine) for tensor in fragment.tensors.values()]


def case_same_layout(folder: Path, layout: Layout) -> None:
    """Saved, loaded into an engine with other weights: both go on with bit-equal losses, weights and moments."""
    alone = make_alone()
    engine, other = make_engine(layout, alone, seed=0), make_engine(layout, alone, seed=1)
    train(engine, 0, 3)
    train(other, 0, 1)  # so that gathered weights of before the load would be seen
    load(other, save(engine, folder, 3))
    assert adam_steps(other) == 3
    assert train(other, 3, 2) == train(engine, 3, 2)
    for a, b in zip(held(other), held(engine), strict=True):
        assert torch.equal(a, b)


def case_save_changes_nothing(folder: Path) -> None:
    alone = make_alone()
    engine, other = (make_engine(Layout(data=2), alone, seed=0) for _ in range(2))
    save(engine, folder, 0)  # before the first step: Adam's state is made by the save
    assert adam_steps(engine) == 0
    assert train(engine, 0, 2) == train(other, 0, 2)
    for a, b in zip(held(engine), held(other), strict=True):
        assert torch.equal(a, b)


RESHARDINGS = [Layout(2, tensor=2), Layout(3), Layout(2, data=2), Layout(1), Layout(3, tensor=2), Layout(1, data=2)]


def case_reshard(folder: Path) -> None:
    """One step in each of many layouts equals as many steps in one."""
    alone = make_alone()
    straight = make_engine(Layout(1, data=2), alone, seed=0)
    train(straight, 0, 1)
    path = save(straight, folder / "first", 1)
    for step, layout in enumerate(RESHARDINGS, start=1):
        engine = make_engine(layout, alone, seed=step)
        load(engine, path)
        train(engine, step, 1)
        assert adam_steps(engine) == step + 1
        path = save(engine, folder / f"after {step}", step + 1)
    train(straight, 1, len(RESHARDINGS))
    last = make_engine(Layout(1, data=2), alone, seed=9)
    load(last, path)
    for a, b in zip(held(last), held(straight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def case_weights_only(folder: Path) -> None:
    """Weights only: those of the checkpoint, and an optimizer as new."""
    alone = make_alone()
    engine, fresh = make_engine(Layout(2, data=2), alone, seed=0), make_engine(Layout(1, "bf16", data=2), alone, seed=1)
    train(engine, 0, 2)
    train(fresh, 0, 2)
    load(fresh, save(engine, folder, 2), weights_only=True)
    assert adam_steps(fresh) == 0
    full, _ = read_full(folder)
    for fragment in zero_fragments(fresh):
        expected = fragment.spec.cut(full[fragment.spec.name]).reshape(-1)[fragment.start :][: fragment.numel]
        assert torch.equal(fragment.tensors["model"], expected)
        assert not fragment.tensors["exp_avg"].any() and not fragment.tensors["exp_avg_sq"].any()
    for parameter in fresh.module.parameters():
        full_local = parameter.shard_spec.cut(full[parameter.shard_spec.name])
        assert torch.equal(parameter, full_local.bfloat16())


def case_pipeline_tied(folder: Path) -> None:
    """Two stages with a tied embedding: the copy on rank 0 is not written, and is loaded."""
    alone, rank = make_alone(), dist.get_rank()
    names = [["embedding.weight", "layers.0.mlp.fc1.weight"], ["layers.0.mlp.fc2.weight", "norm", "embedding.weight"]]
    copy = "embedding.weight" if rank == 0 else ""
    first = make_engine(Layout(), alone, seed=rank, names=names[rank], copy=copy)  # with other weights in the copy
    [original] = [p.detach().clone() for p in first.module.parameters() if p.shard_spec.name == "embedding.weight"]
    dist.broadcast(original, 1)
    path = save(first, folder, 1)
    assert torch.equal(read_full(path)[0]["embedding.weight"], original)
    second = make_engine(Layout(), alone, seed=7, names=names[1 - rank])
    load(second, path)
    [embedding] = [p for p in second.module.parameters() if p.shard_spec.name == "embedding.weight"]
    assert torch.equal(embedding, original)


def case_failure(folder: Path, failing_rank: int, function: str) -> None:
    """A file operation fails on one rank: both get one line that says so, nothing is left, the next save works."""
    engine = make_engine(Layout(data=2), make_alone(), seed=0)
    old = save(engine, folder, 1)
    working = getattr(os, function)

    def full_disk(*arguments):
        if function == "rename" and not str(arguments[1]).endswith("step-00000002"):
            return working(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == failing_rank:
        setattr(os, function, full_disk)
    try:
        save(engine, folder, 2)
        raise AssertionError("the save succeeded")
    except CheckpointError as error:
        assert f"rank {failing_rank}: [Errno 28] No space left on device" in str(error)
        assert "step 2 was not saved" in str(error) and "\n" not in str(error)
    finally:
        setattr(os, function, working)
    dist.barrier()
    assert os.listdir(folder) == [old.name]
    dist.barrier()
    assert newest_valid(folder, pytest.fail) == old
    assert newest_valid(folder, pytest.fail) != save(engine, folder, 2) == newest_valid(folder, pytest.fail)


def case_damage(folder: Path) -> None:
    """Both ranks fall back to the same checkpoint; rank 0 says why."""
    engine = make_engine(Layout(data=2), make_alone(), seed=0)
    good, bad = save(engine, folder, 1), save(engine, folder, 2)
    if dist.get_rank() == 0:
        (bad / "__1_0_0.distcp").write_bytes(b"")
    dist.barrier()
    said: list[str] = []
    assert newest_valid(folder, said.append) == good
    assert [f"{bad}" in line and "__1_0_0.distcp has 0 bytes" in line for line in said] == [True] * (
        1 - dist.get_rank()
    )


def case_mismatch(folder: Path) -> None:
    """One rank's parameter is not in the checkpoint: both refuse, and nothing changes."""
    alone = make_alone()
    path = save(make_engine(Layout(), alone, seed=0, names=["norm"]), folder, 1)
    names = [["norm"], ["norm", "embedding.weight"]]
    engine = make_engine(Layout(), alone, seed=1, names=names[dist.get_rank()])
    before = held(engine)
    with pytest.raises(CheckpointError, match=r"no parameter embedding\.weight, which is \(13, 6\)"):
        load_checkpoint(path, zero_fragments(engine))
    assert all(torch.equal(a, b) for a, b in zip(before, held(engine), strict=True))


SAME = [Layout(stage, precision, data=2) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
CASES = {
    **{f"zero {x.stage} {x.precision} resumes bit for bit": (case_same_layout, x) for x in SAME},
    "tensor parallel bf16 resumes bit for bit": (case_same_layout, Layout(1, "bf16", tensor=2)),
    "a save changes nothing": (case_save_changes_nothing,),
    "one run through many layouts": (case_reshard,),
    "weights only": (case_weights_only,),
    "tied embedding over pipeline stages": (case_pipeline_tied,),
    "full disk on rank 0, tensors": (case_failure, 0, "fsync"),
    "full disk on rank 1, tensors": (case_failure, 1, "fsync"),
    "full disk on rank 0, commit": (case_failure, 0, "rename"),
    "damage": (case_damage,),
    "mismatch": (case_mismatch,),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("zero")
    cases = [(name, case, (folder / name, *arguments)) for name, (case, *arguments) in CASES.items()]
    return run_cases(cases, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_save_and_load_what_one_would(failures, name):
    assert failures[name] == "", failures[name]


class GroupStepAdam(torch.optim.Optimizer):
    """Counts steps as apex.optimizers.FusedAdam does: in the group, from the first step on."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__([parameter], {"lr": 0.1})


def test_apex_keeps_the_step_in_the_group():
    master = torch.zeros(3)
    optimizer = Optimizer(GroupStepAdam(master))
    optimizer.place([Partition(master, ())])
    assert optimizer.scalars() == {"step": 0}
    optimizer.load_scalars({"step": 12})
    assert optimizer.client.param_groups[0]["step"] == optimizer.scalars()["step"] == 12
    assert optimizer.state(master).keys() == optimizer.client.state[master].keys() == {"exp_avg", "exp_avg_sq"}


def test_an_optimizer_without_zero_is_refused():
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(), module=torch.nn.Module(), device="cpu", zero_optimization_stage=lambda: 0
    )
    with pytest.raises(TypeError, match="use zero_stage 1, 2 or 3"):
        ZeroEngine(engine, Optimizer(GroupStepAdam(torch.zeros(3))))


def test_a_checkpoint_of_before_optimizers_had_names_is_of_adamw():
    assert saved_optimizer({"adam_step": 7}) == {"name": "adamw", "step": 7}
    assert saved_optimizer({"optimizer": {"name": "muon", "step": 3}}) == {"name": "muon", "step": 3}
