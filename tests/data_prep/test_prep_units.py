"""Units of work: the corpus is the same however it is cut, by how many tasks, after which kills and additions; nothing is done twice."""

import dataclasses
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from based_megatron.data.manifest import Manifest, load_manifest
from based_megatron.data.reader import SequenceReader
from based_megatron.data_prep import duplicates, shuffle, units
from based_megatron.data_prep.cli import main
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Corpus, Skips
from based_megatron.data_prep.prepare import prepare
from based_megatron.data_prep.run_files import document_key
from based_megatron.data_prep.shuffle import WriteShards
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.data_prep.units import TokenizeUnits, is_validation
from based_megatron.errors import DataError

UNIT_BYTES = 4000


def text(file: str, i: int) -> str:
    return f"{file} {i} " + " ".join(random.Random(f"{file}{i}").choices(["sun", "moon", "a", "wood"], k=i * 7 % 60))


def write_lines(path: Path, count: int, compress=bytes) -> None:
    lines = "".join(json.dumps({"text": text(path.name, i)}) + "\n" + "\n" * (i % 3 == 0) for i in range(count))
    path.write_bytes(compress(lines.encode()))


def write_inputs(folder: Path) -> None:
    """Files of all kinds: big ones that can be cut, one that cannot, many small ones, copies, and some that are damaged."""
    folder.mkdir()
    write_lines(folder / "big.jsonl", 150)
    write_lines(folder / "whole.jsonl.gz", 150, gzip.compress)
    table = pyarrow.table({"text": [text("rows", i) for i in range(100)]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=20)
    for i in range(30):
        (folder / f"small{i:02d}.txt").write_text(text("small", i))
    for name in ("copy1.txt", "copy2.txt"):
        (folder / name).write_text("a copy " * 5)
    (folder / "bad.txt").write_bytes(b"\xff")
    (folder / "void.txt").write_bytes(b"")


@pytest.fixture(autouse=True)
def small_bins(monkeypatch):
    """Bins so small that a small corpus has many."""
    monkeypatch.setattr(shuffle, "BIN_TOKENS", 100)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text("big.jsonl", i) for i in range(100)], 300).save(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, tokenizer) -> PrepConfig:
    """Many files and units, blocks of 300 tokens."""
    write_inputs(tmp_path / "in")
    return PrepConfig(
        (str(tmp_path / "in"),),
        str(tmp_path / "out"),
        tokenizer,
        validation_fraction=0.2,
        block_tokens=300,
        shard_blocks=3,
        tasks=1,
        unit_bytes=UNIT_BYTES,
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def in_order(manifest: Manifest, split: str) -> list[tuple[str, tuple[str, int]]]:
    """(text, origin) of every document of a split, put together over blocks."""
    reader = SequenceReader(manifest, split, 1)
    stream = np.concatenate([reader.block(i) for i in range(len(reader.members))])
    ends = np.flatnonzero(stream == manifest.eos_id) + 1
    tokenizer = Tokenizer.from_file(str(manifest.folder / "tokenizer.json"))
    origins: dict[int, tuple[str, int]] = {}
    for number, member in enumerate(reader.members):
        for i, (file, record) in enumerate(reader.origins(number)):
            assert origins.setdefault(member.first_document + i, (file, record)) == (file, record)
    assert sorted(origins) == list(range(len(ends))) and ends[-1] == len(stream)
    return [(tokenizer.decode(part.tolist()), origins[i]) for i, part in enumerate(np.split(stream, ends[:-1]))]


@pytest.fixture
def tokenized(monkeypatch) -> list[str]:
    """The pieces that were tokenized by this process: their files, with the first bytes of those that are cut."""
    done: list[str] = []
    call = TokenizeUnits.__call__

    def noted(self, unit, tell):
        done.extend(f"{piece.name}@{piece.begin}" for piece in unit.pieces)
        return call(self, unit, tell)

    monkeypatch.setattr(TokenizeUnits, "__call__", noted)
    return done


@pytest.mark.parametrize("seed", [42, 7])
def test_the_order_is_that_of_keys_of_seed_file_and_record(config, seed):
    config = dataclasses.replace(config, seed=seed)
    manifest = prepare(config)
    for split in ("train", "validation"):
        documents = [
            (document_key(seed, document.file, document.record), document.text, (document.file, document.record))
            for document in Corpus(config).documents(Skips(quiet=True))
            if is_validation(document.text, 0.2) == (split == "validation")
        ]
        assert in_order(manifest, split) == [(text, origin) for _, text, origin in sorted(documents)]
    assert manifest.skipped == {"empty": 1, "undecodable": 1}


@pytest.mark.parametrize("at_a_time", [10**6, 30])
def test_of_documents_with_one_text_the_first_in_the_order_stays(config, tmp_path, monkeypatch, tokenized, at_a_time):
    for name in ("again.jsonl", "and_again.jsonl"):
        (tmp_path / "in" / name).write_bytes((tmp_path / "in" / "big.jsonl").read_bytes()[:3000].rpartition(b"\n")[0])
    prepare(config)
    tokenized.clear()
    monkeypatch.setattr(duplicates, "DOCUMENTS_AT_A_TIME", at_a_time)
    manifest = prepare(dataclasses.replace(config, deduplicate=True, overwrite=True))
    left_out = 0
    documents = list(Corpus(config).documents(Skips(quiet=True)))
    for split in ("train", "validation"):
        ordered = sorted(
            (document_key(42, document.file, document.record), document.text, (document.file, document.record))
            for document in documents
            if is_validation(document.text, 0.2) == (split == "validation")
        )
        first = {}
        for _, text, origin in ordered:
            first.setdefault(text, origin)
        assert in_order(manifest, split) == list(first.items())
        left_out += len(ordered) - len(first)
    assert manifest.skipped["duplicate"] == left_out > 40 and not tokenized
    assert sum(split.documents for split in manifest.splits.values()) == len(documents) - left_out


def test_the_order_has_no_trace_of_the_files(config):
    files = [origin[0] for _, origin in in_order(prepare(config), "train")]
    changes = sum(one != other for one, other in itertools.pairwise(files))
    shares = [files.count(name) / len(files) for name in set(files)]
    expected = len(files) * (1 - sum(share**2 for share in shares))
    assert abs(changes - expected) < 5 * len(files) ** 0.5


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (units, "RUN_TOKENS", 200),
        (units, "BATCH_CHARACTERS", 10),
        (shuffle, "BIN_TOKENS", 7),
        (shuffle, "BIN_TOKENS", 1 << 20),
        (shuffle, "BUCKET_TOKENS", 1),
        (shuffle, "BUCKET_TOKENS", 50),
    ],
)
def test_how_much_is_in_memory_changes_no_byte(config, tmp_path, monkeypatch, module, name, value):
    prepare(config)
    monkeypatch.setattr(module, name, value)
    prepare(dataclasses.replace(config, output=str(tmp_path / "again")))
    assert contents(tmp_path / "again") == contents(config.output)


@pytest.mark.parametrize("unit_bytes", [10**9, 1500, 1])
def test_how_the_work_is_cut_changes_no_byte(config, tmp_path, unit_bytes):
    prepare(config)
    prepare(dataclasses.replace(config, output=str(tmp_path / "again"), unit_bytes=unit_bytes))
    assert contents(tmp_path / "again") == contents(config.output)


@pytest.mark.parametrize(("block_tokens", "shard_blocks"), [(20, 100), (300, 1), (10**6, 1)])
def test_blocks_of_any_size_hold_the_same_stream(config, tmp_path, block_tokens, shard_blocks):
    expected = prepare(config)
    other = prepare(
        dataclasses.replace(
            config, output=str(tmp_path / "other"), block_tokens=block_tokens, shard_blocks=shard_blocks
        )
    )
    for split in ("train", "validation"):
        assert in_order(other, split) == in_order(expected, split)
        sizes = [member.tokens for member in other.splits[split].members]
        assert set(sizes[:-1]) <= {block_tokens} and 0 < sizes[-1] <= block_tokens
        per_file = [member.file for member in other.splits[split].members]
        assert per_file == [f"{split}/shard-{i // shard_blocks:05d}.tar" for i in range(len(sizes))]
    assert other.splits["train"].documents == expected.splits["train"].documents


def test_blocks_say_whether_a_document_goes_on_in_them(config):
    manifest = prepare(config)
    reader = SequenceReader(manifest, "train", 1)
    members = reader.members
    docs = []
    for member in members:
        with (manifest.folder / member.file).open("rb") as file:
            file.seek(member.docs_offset)
            docs.append(json.loads(file.read(member.docs_bytes)))
    open_ends = [int(reader.block(i)[-1]) != manifest.eos_id for i in range(len(members))]
    assert any(open_ends) and not open_ends[-1]
    assert [each["continues"] for each in docs] == open_ends
    assert [each["continued"] for each in docs] == [False, *open_ends[:-1]]


def test_any_number_of_tasks_gives_the_same_bytes(config, tmp_path):
    prepare(config)
    for tasks in (2, 3):
        prepare(dataclasses.replace(config, output=str(tmp_path / f"tasks{tasks}"), tasks=tasks))
        assert contents(tmp_path / f"tasks{tasks}") == contents(config.output)


@pytest.mark.parametrize("work", [TokenizeUnits, WriteShards])
@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_start_after_a_death_does_what_is_left(config, tmp_path, monkeypatch, work, finished):
    prepare(dataclasses.replace(config, output=str(tmp_path / "undisturbed")))
    call, calls = work.__call__, []

    def dies(self, job, tell):
        if len(calls) == finished:
            raise RuntimeError("killed")
        calls.append(job)
        return call(self, job, tell)

    def counts(self, job, tell):
        calls.append(job)
        return call(self, job, tell)

    monkeypatch.setattr(work, "__call__", dies)
    with pytest.raises(RuntimeError, match="killed"):
        prepare(config)
    assert not Path(config.output).exists()
    monkeypatch.setattr(work, "__call__", counts)
    prepare(config)
    assert contents(config.output) == contents(tmp_path / "undisturbed")
    assert len(set(calls)) == len(calls) > finished


def test_the_executor_of_datatrove_gives_the_same_bytes(config, tmp_path):
    pytest.importorskip("datatrove")
    prepare(config)
    prepare(dataclasses.replace(config, output=str(tmp_path / "other"), tasks=2, executor="datatrove"))
    assert contents(tmp_path / "other") == contents(config.output)
    assert sorted(path.name for path in (tmp_path / "other.units").iterdir()) == sorted(
        path.name for path in (tmp_path / "out.units").iterdir()
    )


def start_and_kill(config: PrepConfig, seconds: float) -> bool:
    """Whether a process that prepares the corpus was finished before it was killed, with SIGKILL, after so long."""
    child = os.fork()
    if child == 0:
        try:
            prepare(config)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_kills_at_any_moment_change_no_byte(config, tmp_path):
    begun = time.monotonic()
    prepare(dataclasses.replace(config, output=str(tmp_path / "undisturbed")))
    seconds = time.monotonic() - begun
    moments, output = random.Random(0), Path(config.output)
    longest_seconds, kills = seconds / 3, 0
    while kills < 8:
        if start_and_kill(config, moments.uniform(0, longest_seconds)):
            longest_seconds /= 2  # it was faster than the first one: begin again, and kill earlier
            shutil.rmtree(output)
            shutil.rmtree(output.with_name("out.units"))
        else:
            kills += 1
            assert not output.exists()
    prepare(config)
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in", "out", "out.units", "undisturbed", "undisturbed.units",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_of_all_its_tasks(config, tmp_path):
    prepare(dataclasses.replace(config, output=str(tmp_path / "undisturbed")))
    options = {"output": config.output, "tokenizer": config.tokenizer, "validation-fraction": 0.2, "block-tokens": 300}
    options |= {"shard-blocks": 3, "tasks": 2, "unit-bytes": UNIT_BYTES}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "based_megatron", "prep", *config.inputs, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    folder = Path(config.output + ".units") / "units"
    while not folder.is_dir() or not any(folder.iterdir()):
        time.sleep(0.02)
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=10)
    assert children and not any(child.is_running() for child in children)
    assert not Path(config.output).exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(config.output) == contents(tmp_path / "undisturbed")


def test_added_files_are_tokenized_and_nothing_else(config, tmp_path, tokenized):
    prepare(config)
    assert len(tokenized) == len(set(tokenized)) > 40
    tokenized.clear()
    write_lines(tmp_path / "in" / "added.jsonl", 5)
    (tmp_path / "in" / "small99.txt").write_text("one more")
    prepare(dataclasses.replace(config, overwrite=True))
    assert tokenized == ["in/added.jsonl@0", "in/small99.txt@0"]
    prepare(dataclasses.replace(config, output=str(tmp_path / "at once")))
    assert contents(config.output) == contents(tmp_path / "at once")


def test_files_that_are_gone_or_changed_cost_their_units_and_leave_no_trace(config, tmp_path, monkeypatch):
    done: list[list[str]] = []
    call = TokenizeUnits.__call__
    monkeypatch.setattr(
        TokenizeUnits, "__call__", lambda *args: done.append([p.name for p in args[1].pieces]) or call(*args)
    )
    prepare(config)
    gone, changed = "in/small03.txt", "in/copy1.txt"
    mates = {name for names in done if gone in names or changed in names for name in names} - {gone}
    assert len(mates) < len(list((tmp_path / "in").iterdir())) - 5
    done.clear()
    (tmp_path / gone).unlink()
    (tmp_path / changed).write_text("A copy" + (tmp_path / changed).read_text()[6:])
    (tmp_path / "in" / "whole.jsonl.gz").touch()  # its content is the same
    with (tmp_path / "in" / "big.jsonl").open("a") as file:
        file.write(json.dumps({"text": "at the end"}) + "\n")
    prepare(dataclasses.replace(config, overwrite=True))
    assert {name for names in done for name in names} == mates
    prepare(dataclasses.replace(config, output=str(tmp_path / "at once")))
    assert contents(config.output) == contents(tmp_path / "at once")


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"validation_fraction": 0.3}, {"tokenizer": "retrained"}, {"separator": ""}]
)
def test_settings_that_change_documents_make_new_units(config, tmp_path, tokenized, change):
    prepare(config)
    tokenized.clear()
    if "tokenizer" in change:
        change = {"tokenizer": str(tmp_path / "retrained")}
        (tmp_path / "retrained").mkdir()
        train_tokenizer([text("small", i) for i in range(100)], 290).save(tmp_path / "retrained")
    prepare(dataclasses.replace(config, overwrite=True, **change))
    assert len(tokenized) > 30
    kept = list((Path(config.output + ".units") / "units").iterdir())
    tokenized.clear()
    prepare(dataclasses.replace(config, overwrite=True, **change))
    assert not tokenized and list((Path(config.output + ".units") / "units").iterdir()) == kept


def test_other_blocks_need_no_new_units(config, tokenized):
    prepare(config)
    tokenized.clear()
    assert prepare(dataclasses.replace(config, block_tokens=77, overwrite=True)).splits["train"].members[0].tokens == 77
    assert not tokenized


def test_what_is_kept_is_the_units_of_the_corpus_or_nothing(config):
    prepare(config)
    folder = Path(config.output + ".units")
    tokens = sum(split.tokens for split in load_manifest(config.output).splits.values())
    assert sum(path.stat().st_size for path in folder.rglob("*.tokens")) == tokens * 2
    assert not list((folder / "shards").iterdir())
    prepare(dataclasses.replace(config, overwrite=True, keep_units=False))
    assert not folder.exists()


def test_a_folder_of_others_in_the_place_of_the_units_stays(config, tmp_path):
    (tmp_path / "out.units").mkdir()
    (tmp_path / "out.units" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"out\.units is in the way"):
        prepare(config)
    assert (tmp_path / "out.units" / "thesis.tex").read_text() == "precious"


def test_files_of_others_among_the_units_stay(config, tmp_path):
    prepare(config)
    (tmp_path / "out.units" / "thesis.tex").write_text("precious")
    prepare(dataclasses.replace(config, overwrite=True, keep_units=False))
    assert [path.name for path in (tmp_path / "out.units").iterdir()] == ["thesis.tex"]


def test_what_killed_tasks_left_half_done_is_removed(config, tmp_path, tokenized):
    prepare(config)
    folder = tmp_path / "out.units" / "units"
    (folder / ".half.host.1.new").mkdir()
    broken = next(folder.glob("[!.]*"))
    (broken / "unit.json").write_text("{")
    before = contents(config.output)
    tokenized.clear()
    prepare(dataclasses.replace(config, overwrite=True))
    assert tokenized and contents(config.output) == before and not list(folder.glob(".*"))


def test_a_file_that_is_written_to_while_it_is_read_ends_the_run(config, tmp_path, monkeypatch):
    changes = iter([tmp_path / "in" / "small05.txt"])

    def encode(self, texts):
        for path in changes:
            path.write_text("longer than it was " * 9)
        return original(self, texts)

    original = units.Encoder.encode
    monkeypatch.setattr(units.Encoder, "encode", encode)
    with pytest.raises(DataError, match=r"small05\.txt was written to while it was read"):
        prepare(config)


def test_what_was_skipped_is_said_again_of_units_that_are_kept(config, caplog):
    manifest = prepare(config)
    caplog.clear()
    assert prepare(dataclasses.replace(config, overwrite=True)).skipped == manifest.skipped
    assert "skipped in/bad.txt:1 (undecodable)" in caplog.text
    with pytest.raises(DataError, match=r"1 skipped, more than the 0 of --max-skipped, when in/bad\.txt:1 was"):
        prepare(dataclasses.replace(config, overwrite=True, strict=True))


def test_status_tells_how_much_is_finished(config, tmp_path, capsys, monkeypatch):
    with pytest.raises(DataError, match="there is no corpus"):
        main(["status", config.output])
    call, calls = TokenizeUnits.__call__, []

    def dies(self, job, tell):
        if len(calls) == 3:
            raise RuntimeError
        calls.append(job)
        return call(self, job, tell)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizeUnits, "__call__", dies)
        with pytest.raises(RuntimeError):
            prepare(config)
    main(["status", config.output])
    out = capsys.readouterr().out
    finished = sum(unit.bytes for unit in calls) / 1e6
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) / 1e6
    assert "no `based prep` is at work\nunits: 3 of " in out.replace(config.output + ": ", "")
    assert f"finished, {finished:,.1f} of {total:,.1f} MB" in out
    prepare(config)
    main(["status", config.output])
    out = capsys.readouterr().out
    documents = load_manifest(config.output).splits["train"].documents
    assert f"corpus: train {documents} documents" in out
