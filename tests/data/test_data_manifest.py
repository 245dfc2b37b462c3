"""The manifest: what it refuses, and what it lets others read."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import EOS, VOCAB_SIZE, as_version, numbered_documents, random_lengths, write_corpus

from based_megatron.data.manifest import (
    blocks_name,
    check_tokenizer,
    fingerprint,
    load_manifest,
    save_manifest,
    verify,
)
from based_megatron.errors import DataError

OLD_FINGERPRINTS = [
    "ea1f17faf838bc7dead72e9e018e3ffd",
    "79065c5a6026d4c3fc621eac9cf812e0",
    "a08714d0ac8860e3155ef7077da8657a",
]
"""What a small corpus has, as versions 1, 2 and 3 wrote it."""


@pytest.fixture
def corpus(tmp_path):
    """A corpus of several blocks and shards."""
    lengths = random_lengths(60, 40)
    write_corpus(tmp_path / "c", numbered_documents(lengths), numbered_documents([30], 90_000), block_tokens=256)
    return tmp_path / "c"


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def test_a_saved_manifest_reads_back_equal(corpus):
    manifest = load_manifest(corpus)
    save_manifest(manifest)
    assert load_manifest(corpus / "manifest.json") == manifest


def test_offsets_point_at_the_tokens_and_documents(corpus):
    manifest = load_manifest(corpus)
    stream = np.concatenate(numbered_documents(random_lengths(60, 40)))
    read, first = [], 0
    for member in manifest.splits["train"].members:
        data = (corpus / member.file).read_bytes()
        read.append(np.frombuffer(data[member.offset : member.offset + manifest.token_bytes(member)], "<u4"))
        docs = json.loads(data[member.docs_offset : member.docs_offset + member.docs_bytes])
        origins = json.loads(data[member.origins_offset : member.origins_offset + member.origins_bytes])
        assert docs["first_document"] == member.first_document
        assert len(docs["ends"]) == len(origins) == member.docs
        # Every end but that of a document that goes on lies behind an eos, and every eos is an end.
        ends = docs["ends"][:-1] if docs["continues"] else docs["ends"]
        assert ends == (np.flatnonzero(read[-1] == EOS) + 1).tolist()
        assert docs["continued"] == bool(first and stream[first - 1] != EOS)
        assert [record - 1 for _, record in origins] == list(
            range(member.first_document, member.first_document + member.docs)
        )
        first += member.tokens
    assert np.array_equal(np.concatenate(read), stream)
    assert manifest.splits["train"].documents == 60 and manifest.splits["train"].tokens == len(stream)


def test_a_document_over_several_blocks_keeps_its_number(tmp_path):
    manifest = write_corpus(tmp_path / "c", numbered_documents([3, 600, 2]), block_tokens=256)
    assert [member.first_document for member in manifest.splits["train"].members] == [0, 1, 1]
    assert [member.docs for member in manifest.splits["train"].members] == [2, 1, 2]


def test_a_document_that_fills_a_block_exactly_is_not_continued(tmp_path):
    manifest = write_corpus(tmp_path / "c", numbered_documents([255, 4]), block_tokens=256)
    flags = []
    for member in manifest.splits["train"].members:
        data = (tmp_path / "c" / member.file).read_bytes()
        docs = json.loads(data[member.docs_offset :][: member.docs_bytes])
        flags.append((docs["continued"], docs["continues"], docs["first_document"]))
    assert flags == [(False, False, 0), (False, False, 1)]


def test_the_webdataset_library_streams_the_same_tokens(corpus):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset

        urls = sorted(str(path) for path in (corpus / "train").iterdir())
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(urls) > 1
    members = load_manifest(corpus).splits["train"].members
    assert [sample["__key__"] for sample in samples] == [member.key for member in members]
    stream = np.concatenate(numbered_documents(random_lengths(60, 40)))
    assert np.array_equal(np.concatenate([sample["tokens.npy"] for sample in samples]), stream)
    assert [len(sample["docs.json"]["ends"]) for sample in samples] == [member.docs for member in members]


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json .*data\.path") as error:
        load_manifest(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"version": 5}', b'{"version": 4}', b'{"version": 3}', b"{}"]
)
def test_a_file_that_is_no_manifest(corpus, content):
    (corpus / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json.*based prep") as error:
        load_manifest(corpus)
    assert one_line(error)


def test_an_edited_manifest_is_refused(corpus):
    path = corpus / "manifest.json"
    path.write_text(path.read_text().replace(f'"eos_id": {EOS}', '"eos_id": 1'))
    with pytest.raises(DataError, match="fingerprint"):
        load_manifest(corpus)


def test_a_missing_shard_is_named(corpus):
    (corpus / "train" / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar .*No such file") as error:
        load_manifest(corpus)
    assert one_line(error)


def test_a_shard_that_is_one_byte_short(corpus):
    member = load_manifest(corpus).splits["train"].members[-1]
    with (corpus / member.file).open("r+b") as file:
        file.truncate(member.end - 1)
    with pytest.raises(DataError, match=f"truncated: {member.end - 1} bytes, the manifest needs {member.end}"):
        load_manifest(corpus)


def test_each_rank_looks_at_its_share_of_the_shards(corpus):
    """Every shard is looked at by exactly one rank, whatever their number."""
    files = [file for split in load_manifest(corpus).splits.values() for file in split.table.files]
    assert len(files) > 3
    for ranks in (1, 2, 3, len(files) + 5):
        for file in files:
            (corpus / file).rename(corpus / "away")
            refusals = 0
            for rank in range(ranks):
                try:
                    load_manifest(corpus, share=(rank, ranks))
                except DataError as error:
                    refusals += 1
                    assert file in str(error)
            (corpus / "away").rename(corpus / file)
            assert refusals == 1


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_table_is_named(corpus, split):
    path = corpus / blocks_name(split)
    whole = path.read_bytes()
    other = (corpus / blocks_name("validation" if split == "train" else "train")).read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    for content in (b"", whole[:20], whole[:-1], whole[:-116], flipped, other, b"\x93NUMPY\x01\x00" + b"x" * 200):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}.*restore it or write the corpus again") as error:
            load_manifest(corpus)
        assert one_line(error)
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read {path}.*No such file"):
        load_manifest(corpus)


def test_a_manifest_is_small_beside_its_tables(corpus):
    """Whatever a block has more of is in a table: millions of blocks are no millions of objects to parse."""
    values = json.loads((corpus / "manifest.json").read_text())
    assert values["version"] == 4 and values["splits"]["train"].keys() == {
        "documents",
        "tokens",
        "files",
        "blocks_xxh3",
    }


def test_the_fingerprint_of_an_old_corpus_is_what_it_was(tmp_path):
    """Checkpoints name corpora by it; change it only for versions that are not yet written."""
    write_corpus(tmp_path / "c", numbered_documents([3, 20, 9]), numbered_documents([4], 100), block_tokens=16)
    written = load_manifest(tmp_path / "c")
    assert [as_version(written, version).fingerprint for version in (1, 2, 3)] == OLD_FINGERPRINTS


def test_an_untouched_corpus_verifies(corpus):
    verify(load_manifest(corpus))


@settings(max_examples=25, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), number=st.integers(0, 3), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, place, number, bit):
    folder = tmp_path_factory.mktemp("flip") / "c"
    manifest = write_corpus(folder, numbered_documents(random_lengths(60, 40)), block_tokens=256)
    member = manifest.splits["train"].members[number]
    with (folder / member.file).open("r+b") as file:
        file.seek(member.begin + int(place * (member.end - member.begin)))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ (1 << bit)]))
    with pytest.raises(DataError, match=f"{member.file} is damaged: sample {member.key}"):
        load_manifest(folder, check_hashes=True)


def test_another_tokenizer_beside_the_manifest(corpus):
    (corpus / "tokenizer.json").write_text((corpus / "tokenizer.json").read_text().replace('"b"', '"c"'))
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer of this corpus") as error:
        check_tokenizer(load_manifest(corpus), VOCAB_SIZE)
    assert one_line(error)


def test_no_tokenizer_beside_the_manifest(corpus):
    (corpus / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"cannot read .*tokenizer\.json"):
        check_tokenizer(load_manifest(corpus), VOCAB_SIZE)


@pytest.mark.parametrize(("vocab_size", "fits"), [(VOCAB_SIZE - 1, False), (VOCAB_SIZE, True), (VOCAB_SIZE + 7, True)])
def test_a_model_with_too_few_tokens_is_refused(corpus, vocab_size, fits):
    manifest = load_manifest(corpus)
    if fits:
        check_tokenizer(manifest, vocab_size)
    else:
        with pytest.raises(DataError, match=rf"model\.vocab_size {vocab_size} is smaller than the {VOCAB_SIZE}"):
            check_tokenizer(manifest, vocab_size)


def test_the_fingerprint_follows_the_content(corpus):
    values = json.loads((corpus / "manifest.json").read_text())
    assert fingerprint(values) == values["fingerprint"]
    assert fingerprint({**values, "eos_id": 5}) != values["fingerprint"]
    assert fingerprint(dict(reversed(values.items()))) == values["fingerprint"]
