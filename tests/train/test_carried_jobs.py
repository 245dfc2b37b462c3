"""With carried states, a run that resumes does what an undisturbed one does, in its own layout bit for bit, in others to rounding."""

import json
import shutil
from pathlib import Path

import pytest

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from support.runs import events, losses, train_in_pool

CARRY = ("--data.carry-state", "--model.layer-pattern", "cLSLc", "--validation.interval-steps", "0")
MIDDLE, LAST = 4, 8
WRITERS = {
    "single": (1, ()),
    "cp2": (2, ("--parallel.context", "2")),
    "tp2": (2, ("--parallel.tensor", "2")),
    "dp2": (2, ("--train.micro-batch-sequences", "1")),
    "pp2-interleaved": (2, ("--parallel.pipeline", "2", "--parallel.virtual-pipeline", "2")),
}
READERS = {
    "single, other micro batches": (1, ("--train.micro-batch-sequences", "4")),
    "cp2-dp2-zero3": (4, ("--parallel.context", "2", "--parallel.zero-stage", "3")),
    "tp2-pp2": (4, ("--parallel.tensor", "2", "--parallel.pipeline", "2")),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Documents of one to some ten sequences of 64 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        json.dumps({"text": f"document {i}: " + " ".join(f"{j * i % 97}" for j in range(20 + 40 * (i % 7)))})
        for i in range(80)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    output = folder / "data"
    prepare(
        PrepConfig(inputs=(str(folder / "text.jsonl"),), output=str(output), vocab_size=300, validation_fraction=0.1)
    )
    return output


@pytest.fixture(scope="module")
def uninterrupted(worker_pool, corpus, tmp_path_factory):
    """uninterrupted(writer) is the run folder of a job in that layout that nobody disturbed."""
    folders: dict[str, Path] = {}

    def get(writer: str) -> Path:
        if writer not in folders:
            folders[writer] = tmp_path_factory.mktemp("run")
            size, overrides = WRITERS[writer]
            worker_pool(size).run(train_in_pool, folders[writer], corpus, *CARRY, *overrides)
        return folders[writer]

    return get


def resume(worker_pool, source: Path, run_dir: Path, corpus: Path, size: int, *overrides: str) -> dict[int, float]:
    """Losses of a job that finds the checkpoint in the middle of another one."""
    name = f"checkpoints/step-{MIDDLE:08d}"
    shutil.copytree(source / name, run_dir / name)
    worker_pool(size).run(train_in_pool, run_dir, corpus, *CARRY, *overrides)
    return losses(run_dir)


def rest_of(curve: dict[int, float]) -> dict[int, float]:
    return {step: loss for step, loss in curve.items() if step > MIDDLE}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_layout_resumes_bit_for_bit(worker_pool, uninterrupted, corpus, tmp_path, writer):
    """Although it validates and samples after each step: passes without gradients leave carried states alone."""
    source, (size, overrides) = uninterrupted(writer), WRITERS[writer]
    beside = (
        "--validation.interval-steps",
        "1",
        "--monitor.sample-interval-steps",
        "1",
        "--monitor.sample-tokens",
        "2",
    )
    found = resume(worker_pool, source, tmp_path, corpus, size, *overrides, *beside)
    assert sorted(found) == list(range(MIDDLE + 1, LAST + 1))
    assert found == rest_of(losses(source))
    assert events(tmp_path, "warning") == [] and len(events(tmp_path, "validation")) == LAST - MIDDLE


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("single", reader) for reader in READERS]
    + [(writer, "single, other micro batches") for writer in WRITERS if writer != "single"],
)
def test_another_layout_resumes(worker_pool, uninterrupted, corpus, tmp_path, writer, reader):
    source = uninterrupted(writer)
    found, expected = resume(worker_pool, source, tmp_path, corpus, *_flat(READERS[reader])), rest_of(losses(source))
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5)
    assert events(tmp_path, "warning") == []


def _flat(layout: tuple[int, tuple[str, ...]]) -> tuple:
    return layout[0], *layout[1]
