"""Reading the parts of stored tensors that a rank needs: each value right, no other byte read, whatever the tiling."""

import os
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.checkpoint import reader, writer
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.ranks import ALONE
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.errors import CheckpointError
from based_megatron.parallel.sharding import ShardSpec

SHAPE = (64, 32)


def fragment(start: int, stop: int, fill: bool, dtype: torch.dtype = torch.float32) -> Fragment:
    """Elements of a matrix of numbers in order, or of nothing yet."""
    flat = torch.arange(start, stop).to(dtype) if fill else torch.zeros(stop - start, dtype=dtype)
    return Fragment(ShardSpec("weight", SHAPE), start, stop - start, {"model": flat})


def count_bytes(monkeypatch) -> dict[str, int]:
    """Bytes that are read of tensors, and of what is around them."""
    counts = {"tensors": 0, "around": 0}
    preadv, pread = os.preadv, os.pread

    def counting_preadv(descriptor, views, at):
        count = preadv(descriptor, views, at)
        counts["tensors"] += count
        return count

    def counting_pread(descriptor, size, at):
        found = pread(descriptor, size, at)
        counts["around"] += len(found)
        return found

    monkeypatch.setattr(reader.os, "preadv", counting_preadv)
    monkeypatch.setattr(reader.os, "pread", counting_pread)
    return counts


def test_many_ranks_read_each_byte_of_what_one_rank_saved_once(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, [fragment(0, prod(SHAPE), fill=True)], {}, ALONE)
    counts = count_bytes(monkeypatch)
    ranks = 8
    cuts = [prod(SHAPE) * rank // ranks for rank in range(ranks + 1)]
    for start, stop in pairwise(cuts):
        mine = fragment(start, stop, fill=False)
        load_checkpoint(path, [mine], ranks=ALONE)
        assert torch.equal(mine.tensors["model"], torch.arange(float(start), float(stop)))
    assert counts["tensors"] == 4 * prod(SHAPE)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_range_is_read_whatever_the_ranges_that_were_saved(tmp_path_factory, data, dtype):
    total = prod(SHAPE)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(1, total - 1), max_size=4))})
    saved = [fragment(a, b, fill=True, dtype=dtype) for a, b in pairwise(cuts)]
    path = save_checkpoint(tmp_path_factory.mktemp("c"), 1, saved, {}, ALONE)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    mine = fragment(start, stop, fill=False, dtype=dtype)
    load_checkpoint(path, [mine], ranks=ALONE)
    assert torch.equal(mine.tensors["model"], torch.arange(start, stop).to(dtype))


def test_columns_of_a_tensor_parallel_rank_are_read_from_the_first_to_the_last(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, [fragment(0, prod(SHAPE), fill=True)], {}, ALONE)
    counts = count_bytes(monkeypatch)
    spec = ShardSpec("weight", SHAPE, partition_dim=1, parts=(SHAPE[1],), rank=1, size=2)
    mine = Fragment(spec, 0, prod(spec.local_shape), {"model": torch.zeros(prod(spec.local_shape))})
    load_checkpoint(path, [mine], ranks=ALONE)
    expected = torch.arange(float(prod(SHAPE))).view(SHAPE)[:, SHAPE[1] // 2 :]
    assert torch.equal(mine.tensors["model"].view(spec.local_shape), expected)
    assert counts["tensors"] == 4 * (prod(SHAPE) - SHAPE[1] // 2)


def test_a_file_that_ends_too_early_is_an_error_and_no_value(tmp_path):
    """Files are verified before; this one was cut since."""
    path = save_checkpoint(tmp_path, 1, [fragment(0, prod(SHAPE), fill=True)], {}, ALONE)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(path, [fragment(0, prod(SHAPE), fill=False)], ranks=ALONE)


def test_a_part_that_cannot_be_written_fails_the_save(tmp_path, monkeypatch):
    """DCP's own threads lose such an error, and the tensors with it."""
    monkeypatch.setattr(writer, "PART_BYTES", 1000)
    fragments = [fragment(a, a + 256, fill=True) for a in range(0, prod(SHAPE), 256)]
    path = save_checkpoint(tmp_path, 1, fragments, {}, ALONE)
    assert len(list(path.glob("*.distcp"))) == writer.WRITER_THREADS
    (tmp_path / "step-00000002.tmp").mkdir()
    write_data = writer.FileSystemWriter.write_data

    def last_is_full(self, plan, planner):
        if plan.storage_data.prefix == "__0_3_":
            raise OSError(28, "No space left on device")
        return write_data(self, plan, planner)

    monkeypatch.setattr(writer.FileSystemWriter, "write_data", last_is_full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, fragments, {}, ALONE)
