"""Ranks that hold the same weights are compared, and the one whose bits differ is named."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from based_megatron.errors import TrainingError
from based_megatron.parallel import replicas as module
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.replicas import fingerprint, odd_ones
from based_megatron.train.callbacks.norms import Norms
from based_megatron.train.trainer import Trainer
from support.runs import events, train_in_pool

CPU = torch.device("cpu")
JOB = (
    "--train.steps", "4", "--guards.replica-check-interval-steps", "2", "--validation.interval-steps", "0",
    "--checkpoint.interval-steps", "0", "--monitor.log-interval-steps", "4",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(place=st.integers(0, 99), bit=st.integers(0, 15), other=st.integers(0, 99))
def test_any_flipped_bit_and_any_swap_changes_the_fingerprint(dtype, place, bit, other):
    values = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [values[:30], values[30:70].view(8, 5), values[70:]]
    before = int(fingerprint(parts, CPU))
    changed = values.clone()
    changed.view(torch.int16)[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert int(fingerprint([changed[:30], changed[30:70], changed[70:]], CPU)) != before
    changed = values.clone()
    changed[[place, other]] = values[[other, place]]
    same = int(fingerprint([changed[:30], changed[30:70], changed[70:]], CPU)) == before
    assert same == bool((changed == values).all())


def test_the_fingerprint_does_not_depend_on_what_is_hashed_at_a_time_but_on_the_order(monkeypatch):
    values = torch.randn(100)
    assert int(fingerprint([values[:50], values[50:]], CPU)) != int(fingerprint([values[50:], values[:50]], CPU))
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 7)
    assert int(fingerprint([values], CPU)) == int(fingerprint([values.clone()], CPU))


@pytest.mark.parametrize(
    ("rows", "tied_stage", "expected"),
    [
        ([(0, 0, 5, 1, 9)] * 4, 0, []),
        ([(0, 0, 5, 1, 9), (0, 0, 5, 1, 9), (0, 0, 6, 1, 9)], 0, [2]),
        ([(0, 0, 5, 1, 9), (0, 0, 6, 1, 9)], 0, [0, 1]),
        ([(0, 0, 5, 1, 9), (0, 0, 5, 1, 9), (0, 0, 6, 1, 9), (0, 0, 6, 1, 9)], 0, [0, 1, 2, 3]),
        ([(0, 0, 5, 1, 9), (1, 0, 7, 1, 8), (2, 0, 8, 2, 7)], 0, [2]),
        ([(0, 0, 5, 1, 9), (0, 1, 6, 2, 9)], 1, []),
        ([(0, 0, 5, 1, 9), (0, 1, 6, 2, 8)], 1, [0, 1]),
        ([(0, 0, 5, 1, 9), (0, 1, 6, 2, 8)], 0, []),
        ([(0, 0, 5, 1, 9), (0, 1, 6, 2, 0), (0, 2, 6, 3, 9)], 2, []),
    ],
)
def test_the_minority_is_named(rows, tied_stage, expected):
    assert odd_ones(rows, tied_stage) == expected


def train_with_a_flip(run_dir: Path, data: Path, rank: int, parameter: str, *overrides: str) -> str:
    """What a rank says after one bit of a weight of one rank has flipped in the first half of the run."""

    def flip(trainer: Trainer) -> None:
        for chunk in trainer.step_runner.chunks if dist.get_rank() == rank and trainer.step == 1 else []:
            for found in chunk.parameters():
                if shard_spec(found).name == parameter:
                    found.data.view(-1)[3:4].view(torch.int32 if found.dtype == torch.float32 else torch.int16)[0] ^= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Norms, "on_gradients", lambda _, trainer: flip(trainer))
        try:
            train_in_pool(run_dir, data, *JOB, *overrides)
        except TrainingError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("size", "rank", "parameter", "overrides", "named"),
    [
        (2, 1, "layers.1.mlp.fc1.weight", (), [0, 1]),
        (4, 2, "embedding.weight", ("--train.precision", "bf16"), [2]),
        (2, 0, "final_norm.weight", ("--parallel.tensor", "2"), [0, 1]),
        (2, 1, "embedding.weight", ("--parallel.pipeline", "2"), [0, 1]),
        pytest.param(4, 0, "", ("--parallel.pipeline", "2", "--parallel.tensor", "2"), [], marks=pytest.mark.slow),
        (2, 0, "", ("--parallel.context", "2", "--parallel.zero-stage", "2"), []),
        (2, 1, "layers.1.mlp.fc1.weight", ("--parallel.zero-stage", "3"), []),
    ],
)
def test_a_flipped_bit_ends_the_run_and_names_the_rank(
    worker_pool, corpus, tmp_path, size, rank, parameter, overrides, named
):
    said = worker_pool(size).run(train_with_a_flip, tmp_path, corpus, rank, parameter, *overrides)
    assert len(set(said)) == 1, "all ranks say the same"
    assert bool(said[0]) == bool(named)
    if named:
        (event,) = events(tmp_path, "replica_mismatch")
        assert (event["step"], event["ranks"]) == (2, named) and len(event["hosts"]) == len(named)
        assert all(f"{number} ({event['hosts'][0]})" in said[0] for number in named) and "in step 2" in said[0]
