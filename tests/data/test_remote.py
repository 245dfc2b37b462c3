"""Corpora behind URLs: the same order and tokens as from a folder, through a bounded, shared cache; one line for what is lost."""

import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from made_corpora import as_version, numbered_documents, random_lengths, write_corpus

from based_megatron.config.limits import absolute_paths
from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data import remote as remote_module
from based_megatron.data.cli import main
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import verify
from based_megatron.data.remote import SUFFIX, Cache, RemoteFolder, open_corpus
from based_megatron.data.sources import Sources
from based_megatron.errors import BasedError, ConfigError, DataError

S, BATCH, STEPS, PART = 16, 4, 20, 2048
URL = "memory://bucket/c"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(remote_module, "PART_BYTES", PART)
    monkeypatch.setattr(remote_module, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A corpus of some shards in a folder, and the same behind URL."""
    documents = numbered_documents(random_lengths(80, 60))
    write_corpus(tmp_path / "c", documents, numbered_documents([90], 90_000), block_tokens=300)
    upload(tmp_path / "c")
    return tmp_path / "c"


def upload(folder: Path) -> None:
    """Put a folder behind URL, in the place of what was there."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/c/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def fetched(monkeypatch) -> Counter[tuple[str, int | None]]:
    """How often each (file, first byte) has been fetched."""
    found: Counter[tuple[str, int | None]] = Counter()
    read = RemoteFolder.read

    def counting(self, name, begin=None, end=None):
        found[name, begin] += 1
        return read(self, name, begin, end)

    monkeypatch.setattr(RemoteFolder, "read", counting)
    return found


def settings(corpus: Path, path: str = URL, **changes) -> DataConfig:
    cache = str(corpus.parent / "cache")
    return DataConfig(
        **{"path": path, "sequence_length_tokens": S, "num_workers": 0, "seed": 1, "cache_dir": cache} | changes
    )


def loader(data: DataConfig, rank: int = 0, dp: int = 1, ahead: bool = False) -> Loader:
    made = Loader(Sources(data), data, BATCH, BATCH // dp, rank, dp)
    if not ahead and made._ahead is not None:
        made._ahead.close()
        made._ahead = None
    return made


def tokens(batches: Loader, step: int) -> list[list[int]]:
    (batch,) = batches.micro_batches(step)
    return batch.tokens_BL.tolist()


def everything(batches: Loader) -> list:
    """The batches of all steps and of the validation, with their documents."""
    found = [batch for step in range(STEPS) for batch in batches.micro_batches(step)]
    found += batches.validation_batches(8)
    return [(b.tokens_BL.tolist(), b.loss_mask_BL.tolist(), [s.tolist() for s in b.documents.starts]) for b in found]


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_batches_are_those_of_the_folder(corpus, version, ahead):
    if version < 4:
        as_version(open_corpus(str(corpus), settings(corpus)), version)
        upload(corpus)
    local = everything(loader(settings(corpus, str(corpus))))
    batches = loader(settings(corpus), ahead=ahead)
    assert everything(batches) == local
    batches.close()
    assert Sources(settings(corpus)).fingerprint == Sources(settings(corpus, str(corpus))).fingerprint
    # From the cache, and from another process' view of it.
    assert everything(loader(settings(corpus))) == local


def test_ranks_of_a_node_fetch_each_part_once(corpus, fetched):
    ranks = [loader(settings(corpus), rank, 2) for rank in (0, 1)]
    assert all(count == (2 if name == "manifest.json" else 1) for (name, _), count in fetched.items())

    def read(rank: int) -> None:
        for step in range(STEPS):
            ranks[rank].micro_batches(step)
        ranks[0]._sources.train[0].tokens(rank)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = {key: count for key, count in fetched.items() if key[0].endswith(".tar")}
    assert len(parts) > 10 and set(parts.values()) == {1}
    everything(loader(settings(corpus)))
    assert all(fetched[key] == 1 for key in parts), "a later start reads what is there"


def test_the_cache_is_bounded_and_keeps_what_was_read_last(corpus, fetched):
    limit = 8 * PART
    data = settings(corpus, cache_bytes=limit)
    assert everything(loader(data)) == everything(loader(settings(corpus, str(corpus))))
    assert 0 < sum(path.stat().st_size for path in (corpus.parent / "cache").rglob(f"*{SUFFIX}")) <= limit + 2 * PART
    assert any(count > 1 for count in fetched.values()), "what was removed is fetched again"
    cache = Cache(corpus.parent / "other", 4 * 100)
    for number in (0, 1, 2, 0, 3, 4):
        cache.part(Path("a", "b", f"{number}{SUFFIX}"), lambda: b"x" * 84)
        time.sleep(0.02)  # the clock of files is a coarse one
    left = {path.stem for path in (corpus.parent / "other").rglob(f"*{SUFFIX}")}
    assert left == {"0", "3", "4"}


def test_a_part_that_was_cut_is_fetched_again(corpus):
    expected = everything(loader(settings(corpus)))
    for path in (corpus.parent / "cache").rglob(f"*{SUFFIX}"):
        path.write_bytes(path.read_bytes()[: PART // 2])
    assert everything(loader(settings(corpus))) == expected


def test_the_next_steps_are_fetched_ahead(corpus):
    """What is read ahead is in the cache: its steps need nothing of the remote shards."""
    expected = [tokens(loader(settings(corpus, str(corpus))), step) for step in range(4)]
    batches = loader(settings(corpus), ahead=True)
    tokens(batches, 0)
    assert batches._ahead is not None
    while batches._ahead._pool._work_queue.qsize():
        threading.Event().wait(0.01)
    batches._ahead._pool.shutdown(wait=True)
    batches._ahead = None
    fsspec.filesystem("memory").rm("/bucket/c/train", recursive=True)
    assert [tokens(batches, step) for step in range(4)] == expected


def test_what_fails_for_a_while_is_tried_again(corpus, monkeypatch):
    memory = fsspec.filesystem("memory")
    failures = iter([OSError("reset\nby peer"), TimeoutError(), RuntimeError("slow down")])
    cat = type(memory).cat_file

    def flaky(self, path, start=None, end=None, **kwargs):
        if ".tar" in path and (error := next(failures, None)):
            raise error
        return cat(self, path, start, end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    batches = loader(settings(corpus))
    assert tokens(batches, 0) == tokens(loader(settings(corpus, str(corpus))), 0)
    assert next(failures, None) is None
    shutil.rmtree(corpus.parent / "cache")
    batches, failures = loader(settings(corpus)), iter([OSError("reset\nby peer")] * remote_module.TRIES)
    with pytest.raises(
        DataError, match=rf"cannot read {URL}/train/shard-000\d\d.tar in 6 tries: reset by peer; see that"
    ) as error:
        tokens(batches, 0)
    assert "\n" not in str(error.value)
    assert len(tokens(batches, 0)) == BATCH


def test_a_shard_that_is_lost_or_changed_is_named_and_may_be_put_back(corpus):
    memory, batches = fsspec.filesystem("memory"), loader(settings(corpus))
    expected = tokens(loader(settings(corpus, str(corpus))), 0)
    shards = [f"/bucket/c/{file}" for file in open_corpus(URL, settings(corpus)).splits["train"].table.files]
    kept = {shard: memory.cat_file(shard) for shard in shards}
    for shard in shards:
        memory.rm_file(shard)
    with pytest.raises(DataError, match=rf"there is no {URL}/train/shard-\d+.tar: restore it"):
        tokens(batches, 0)
    for shard, data in kept.items():
        memory.pipe_file(shard, bytes(byte ^ 1 for byte in data))
    with pytest.raises(DataError, match=rf"{URL}/train/shard-\d+.tar is damaged: sample \d+ ") as error:
        tokens(batches, 0)
    assert "\n" not in str(error.value)
    for shard, data in kept.items():
        memory.pipe_file(shard, data)
    assert tokens(batches, 0) == expected, "nothing of the wrong bytes is kept"


def test_another_corpus_in_the_place_of_this_one_is_named(corpus, tmp_path):
    batches = loader(settings(corpus))
    then = open_corpus(URL, settings(corpus)).fingerprint
    now = write_corpus(tmp_path / "other", numbered_documents(random_lengths(80, 60), 50_000), block_tokens=300)
    upload(tmp_path / "other")
    with pytest.raises(
        DataError,
        match=f"another corpus than the run began with: the fingerprint of {URL} was {then} and is {now.fingerprint}",
    ):
        tokens(batches, 0)
    # A new start takes the new one, and mixes up none of their parts.
    assert tokens(loader(settings(corpus)), 0) == tokens(loader(settings(corpus, str(tmp_path / "other"))), 0)


def test_sizes_are_looked_at_before_the_start(corpus):
    memory = fsspec.filesystem("memory")
    shard = "/bucket/c/train/shard-00001.tar"
    memory.pipe_file(shard, memory.cat_file(shard)[:-20000])
    with pytest.raises(DataError, match=f"shard {URL}/train/shard-00001.tar is truncated"):
        Sources(settings(corpus))
    memory.rm_file(shard)
    with pytest.raises(DataError, match=f"there is no {URL}/train/shard-00001.tar"):
        Sources(settings(corpus))


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        (URL, {"cache_dir": ""}, "is a URL: set data.cache_dir"),
        ("memory://bucket/nothing", {}, "there is no memory://bucket/nothing/manifest.json"),
        ("nosuch://bucket/c", {}, "cannot read nosuch://bucket/c/manifest.json: .*nosuch.*install what it needs"),
        (URL, {"cache_dir": "/proc/nowhere"}, "cannot make data.cache_dir /proc/nowhere.*change data.cache_dir"),
    ],
)
def test_what_cannot_be_reached_is_refused_in_one_line(corpus, path, changes, words):
    with pytest.raises(BasedError, match=words) as error:
        Sources(settings(corpus, path, **changes))
    assert "\n" not in str(error.value)


def test_a_url_stays_and_a_folder_becomes_absolute(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    data = DataConfig(sources=(SourceConfig(URL), SourceConfig("c")), cache_dir="cache")
    found = absolute_paths(data)
    assert [source.path for source in found.sources] == [URL, str(corpus)] and found.cache_dir == str(
        corpus.parent / "cache"
    )


def test_every_byte_of_a_remote_corpus_is_verified(corpus, capsys):
    manifest = open_corpus(URL, settings(corpus))
    verify(manifest)
    (corpus.parent / "run.yaml").write_text(
        f"data: {{path: '{URL}', cache_dir: '{corpus.parent / 'cache'}', sequence_length_tokens: {S}}}\n"
    )
    main(["show", "--config", str(corpus.parent / "run.yaml")])
    assert capsys.readouterr().out.startswith(f"{URL}: vocabulary of")
    member = manifest.splits["train"].members[3]
    memory, path = fsspec.filesystem("memory"), f"/bucket/c/{member.file}"
    data = bytearray(memory.cat_file(path))
    data[member.end - 600] ^= 1
    memory.pipe_file(path, bytes(data))
    shutil.rmtree(corpus.parent / "cache")
    with pytest.raises(DataError, match=f"{URL}/{member.file} is damaged: sample {member.key}"):
        verify(open_corpus(URL, settings(corpus)))
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        main(["show", "--path", URL])
