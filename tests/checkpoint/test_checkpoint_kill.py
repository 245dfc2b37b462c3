"""kill -9 at every open, fsync, rename and delete of a save, and among its writes, leaves a checkpoint to resume from.

Saves are asynchronous: the calls are those of the saver's threads, and training has overwritten its tensors meanwhile.
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ckpt_engines import run_cases
from ckpt_fragments import flat, full_tensors, shard

from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.ranks import ALONE
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.saver import Saver
from based_megatron.checkpoint.store import Kept, newest_valid

CALLS = {"fsync", "open", "rename", "mkdir", "unlink", "rmdir"}
WRITES_BETWEEN_KILLS = 97  # there are about 1,200 writes, all to unfinished files


def save_and_prune(folder: Path, step: int) -> None:
    fragments = flat(shard(full_tensors(step), 1, 2))
    saver = Saver(folder, Kept(last=1), ALONE, ALONE, torch.device("cpu"))
    assert saver.take_memory(fragments) == ""
    saver.start(step, fragments, {"consumed_tokens": step}, prunes=True)
    saver.hold_update()
    for fragment in fragments:
        for tensor in fragment.tensors.values():
            tensor.fill_(7.0)
    saved = saver.finish()
    assert not saved.error and not saved.warning


def save_killed_at(event: int, folder: Path, step: int) -> bool:
    """Save in a child that is killed before its event-th file operation; False if it finished before that."""
    child = os.fork()
    if child == 0:
        calls = writes = 0

        def count(frame, kind, function):
            nonlocal calls, writes
            if kind == "c_call" and function.__name__ in CALLS:
                calls += 1
            elif kind == "c_call" and function.__name__ == "write":
                writes += 1
            if calls + writes // WRITES_BETWEEN_KILLS > event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        threading.setprofile(count)
        save_and_prune(folder, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint_and_the_next_save_works(tmp_path, step):
    first = tmp_path / "first"
    save_and_prune(first, 1)
    kept, event = [], 0
    while True:
        folder = tmp_path / f"killed{event}"
        shutil.copytree(first, folder)
        if not save_killed_at(event, folder, step):
            break
        path = newest_valid(folder, on_skip=pytest.fail)
        fragments = shard(None, 1, 1)[0]
        kept.append(load_checkpoint(path, fragments)["consumed_tokens"])
        expected = full_tensors(kept[-1])["exp_avg"]["embedding.weight"]
        assert torch.equal(fragments[0].tensors["exp_avg"].view(13, 6), expected)
        if event % 10 == 0:
            save_and_prune(folder, step)
            assert len(os.listdir(folder)) == 1
        shutil.rmtree(folder)
        event += 1
    assert event > 30, "the kill points were not reached"
    if step == 2:
        assert kept == sorted(kept) and {1, 2} == set(kept), "old until the rename, new after it"


def case_rank_1_is_killed_in_a_save(folder: Path) -> None:
    rank = dist.get_rank()
    save_checkpoint(folder, 1, shard(full_tensors(1), 1, 2)[rank], {"consumed_tokens": 1})
    if rank == 1:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(folder, 2, shard(full_tensors(2), 1, 2)[rank], {"consumed_tokens": 2})


def test_a_killed_rank_leaves_an_unfinished_folder_and_ends_the_others(tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_cases([("killed", case_rank_1_is_killed_in_a_save, (folder,))], tmp_path)
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002.tmp"]
    assert newest_valid(folder, on_skip=pytest.fail) == folder / "step-00000001"
