"""Random damages of checkpoints: each is a correct fallback with a warning, or a refusal in one line, never silent and never wrong."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ckpt_fragments import full_tensors, save, shard

from based_megatron.checkpoint import writer
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.store import newest_valid, step_of
from based_megatron.errors import CheckpointError

STEPS = (100, 200)
FAST = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two checkpoints, each with several files of tensors."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PART_BYTES", 1000)
        for step in STEPS:
            assert len(list(save(folder, step).glob("*.distcp"))) > 2
    return folder


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.choice([0, len(content) - 1, chance.randrange(len(content))])])


def zero_a_part(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def append(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes([chance.randrange(256)]))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def rename(path: Path, chance: random.Random) -> None:
    path.rename(path.with_name(path.name + ".bak"))


def make_a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def take_that_of_the_other(path: Path, chance: random.Random) -> None:
    other = next(folder for folder in path.parent.parent.iterdir() if folder != path.parent)
    if (other / path.name).is_file():
        shutil.copy(other / path.name, path)


def swap_names(path: Path, chance: random.Random) -> None:
    other, aside = chance.choice(sorted(path.parent.iterdir())), path.with_name("aside")
    path.rename(aside)
    if other != path:
        other.rename(path)
    aside.rename(other)


def listed(checkpoint: Path) -> list[dict]:
    """The files that the manifest of this checkpoint named before it was damaged."""
    try:
        return json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [{"name": "state.json", "size_bytes": 3, "xxh3": "0"}]


def list_less(path: Path, chance: random.Random) -> None:
    """The manifest forgets some files, or all."""
    manifest, files = path.parent / "manifest.json", listed(path.parent)
    manifest.write_text(json.dumps({"files": chance.sample(files, chance.randrange(len(files)))}))


def change_the_list(path: Path, chance: random.Random) -> None:
    """An entry is another thing than it should be."""
    manifest, files = path.parent / "manifest.json", listed(path.parent)
    entry = chance.choice(files)
    entry[chance.choice(sorted(entry))] = chance.choice([None, 7, "../x", [], {}, True])
    manifest.write_text(json.dumps(chance.choice([{"files": files}, files, {}, 3, {"files": 3}])))


def rename_the_checkpoint(path: Path, chance: random.Random) -> None:
    name = chance.choice(
        ["backup", "step-200", "step-00000300", "step-00000050", "step-00000400.old", "step-00000200x"]
    )
    path.parent.rename(path.parent.with_name(name))


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip,
    truncate,
    zero_a_part,
    append,
    delete,
    rename,
    make_a_folder,
    dangle,
    take_that_of_the_other,
    swap_names,
    list_less,
    change_the_list,
    rename_the_checkpoint,
]


@pytest.mark.parametrize(
    "seed", [*range(FAST), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FAST, 240))]
)
def test_a_damage_is_told_and_nothing_wrong_is_loaded(whole, tmp_path, seed):
    chance = random.Random(seed)
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    before = contents(folder)
    for damage in [DAMAGES[seed % len(DAMAGES)], *chance.sample(DAMAGES, chance.choice([0, 0, 0, 1]))]:
        checkpoints = [path for path in sorted(folder.glob("*")) if sorted(path.glob("*.*"))]
        files = sorted(path for path in chance.choice([checkpoints[-1], *checkpoints]).iterdir() if path.is_file())
        damage(chance.choice(files), chance)
    told: list[str] = []
    try:
        found = newest_valid(folder, told.append)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert found is not None, "the run would start over without a word"
    fragments = shard(None, 1, 1)[0]
    state = load_checkpoint(found, fragments)
    step = state["step"]
    assert step == step_of(found) and state["consumed_tokens"] == 10 * step
    for fragment, whole_fragment in zip(fragments, shard(full_tensors(step), 1, 1)[0], strict=True):
        for kind, tensor in fragment.tensors.items():
            assert torch.equal(tensor, whole_fragment.tensors[kind])
    if step == max(STEPS):
        assert told == [] or contents(folder) != before
    else:
        assert told and all("\n" not in line for line in told)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
