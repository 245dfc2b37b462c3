"""`based prep` as a whole: what it writes, and that it writes all or nothing."""

import dataclasses
import gzip
import io
import json
import logging
import os
import resource
import sys
import tempfile
from collections import Counter

import numpy as np
import pytest
import xxhash
from tokenizers import Tokenizer

from based_megatron.cli import main as command_line
from based_megatron.data.manifest import load_manifest
from based_megatron.data.reader import SequenceReader
from based_megatron.data_prep.cli import main
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.data_prep.units import is_validation
from based_megatron.errors import DataError

TEXTS = [f"document {i}: " + " ".join(f"word{i * j % 97}" for j in range(i % 40)) + "\nend" for i in range(200)]


@pytest.fixture
def config(tmp_path):
    """Two hundred documents in one .jsonl, small blocks and shards."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrepConfig(
        inputs=(str(tmp_path / "in.jsonl"),),
        output=str(tmp_path / "out"),
        vocab_size=400,
        validation_fraction=0.2,
        block_tokens=1000,
        shard_blocks=2,
    )


def documents(manifest, split) -> list[tuple[str, int]]:
    """(decoded text, record) of every document of a split, in order, put together over blocks."""
    reader = SequenceReader(manifest, split, 1)
    tokenizer = Tokenizer.from_file(str(manifest.folder / "tokenizer.json"))
    stream = np.concatenate([reader.block(i) for i in range(len(reader.members))])
    ends = np.flatnonzero(stream == manifest.eos_id) + 1
    assert ends[-1] == len(stream)
    records: dict[int, int] = {}
    for number, member in enumerate(reader.members):
        for i, (_, record) in enumerate(reader.origins(number)):
            assert records.setdefault(member.first_document + i, record) == record
    parts = np.split(stream, ends[:-1])
    return [(tokenizer.decode(part.tolist()), records[i]) for i, part in enumerate(parts)]


def test_every_document_is_there_once_with_its_origin(config):
    manifest = prepare(config)
    found = documents(manifest, "train") + documents(manifest, "validation")
    assert sorted(found) == sorted((text, i + 1) for i, text in enumerate(TEXTS))
    assert {name: split.documents for name, split in manifest.splits.items()} == Counter(
        "validation" if is_validation(text, 0.2) else "train" for text in TEXTS
    )


def test_the_returned_manifest_is_the_one_on_disk(config):
    assert prepare(config) == load_manifest(config.output, check_hashes=True)


def test_blocks_and_shards_have_the_sizes_asked_for(config):
    members = prepare(config).splits["train"].members
    assert {member.tokens for member in members[:-1]} == {1000} and 0 < members[-1].tokens <= 1000
    assert Counter(Counter(member.file for member in members[: len(members) // 2 * 2]).values()) == {
        2: len(members) // 2
    }


def test_no_temporary_is_left(config, tmp_path):
    prepare(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "out.units"]
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.new"))


def test_same_input_and_seed_give_the_same_bytes(config, tmp_path):
    prepare(config)
    prepare(dataclasses.replace(config, output=str(tmp_path / "again")))
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


def test_the_seed_changes_the_order_but_not_the_split(config, tmp_path):
    one = prepare(config)
    other = prepare(dataclasses.replace(config, output=str(tmp_path / "other"), seed=1))
    for split in ("train", "validation"):
        first, second = ([text for text, _ in documents(manifest, split)] for manifest in (one, other))
        assert first != second and sorted(first) == sorted(second)


class Pipe:
    """Standard input that bytes are piped into."""

    def __init__(self, content: bytes, isatty: bool = False):
        self.buffer, self.isatty = io.BytesIO(content), lambda: isatty


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_is_piped_in_is_read_as_a_file_would_be(config, tmp_path, monkeypatch, compress):
    expected = prepare(config)
    monkeypatch.setattr(sys, "stdin", Pipe(compress((tmp_path / "in.jsonl").read_bytes())))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    manifest = prepare(dataclasses.replace(config, inputs=("-",), output=str(tmp_path / "piped")))
    for split in ("train", "validation"):
        assert sorted(documents(manifest, split)) == sorted(documents(expected, split))
    assert SequenceReader(manifest, "train", 1).origins(0)[0][0] == "stdin.jsonl"
    assert not list(tmp_path.glob("based-prep-*"))


def test_plain_text_can_be_piped_in(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe("\n\n".join(TEXTS[:50]).encode()))
    manifest = prepare(dataclasses.replace(config, inputs=("-",), separator=""))
    assert sum(split.documents for split in manifest.splits.values()) == 50


def test_standard_input_that_nobody_writes_to_is_refused(config, monkeypatch):
    for inputs, isatty in ((("-",), True), (("-", "-"), False)):
        monkeypatch.setattr(sys, "stdin", Pipe(b"", isatty))
        with pytest.raises(DataError, match="something must be piped into it"):
            prepare(dataclasses.replace(config, inputs=inputs))
    with pytest.raises(DataError, match="other nodes cannot read the standard input"):
        prepare(dataclasses.replace(config, inputs=("-",), executor="ray", tasks=2))


def test_validation_fraction_is_met(tmp_path):
    texts = [f"text number {i}" for i in range(20_000)]
    share = sum(is_validation(text, 0.05) for text in texts) / len(texts)
    assert abs(share - 0.05) < 5 * (0.05 * 0.95 / 20_000) ** 0.5
    assert all(is_validation(text, 0.1) for text in texts if is_validation(text, 0.05))
    assert not any(is_validation(text, 0.0) for text in texts)


def test_gpt2_tokens_of_real_text(shared_dir, tmp_path):
    manifest = prepare(
        PrepConfig(
            inputs=(str(shared_dir / "data" / "tinyshakespeare.txt"),),
            output=str(tmp_path / "out"),
            tokenizer=str(shared_dir / "data"),
            separator="",
        )
    )
    text = (shared_dir / "data" / "tinyshakespeare.txt").read_text()
    found = documents(manifest, "train") + documents(manifest, "validation")
    pieces = [part for part in text.split("\n\n") if part.strip()]
    assert Counter(document.removesuffix("<|endoftext|>").strip("\n") for document, _ in found) == Counter(
        piece.strip("\n") for piece in pieces
    )
    assert (manifest.vocab_size, manifest.eos_id, manifest.dtype) == (50257, 50256, "uint16")
    assert manifest.tokenizer_xxh3 == xxhash.xxh3_128_hexdigest((tmp_path / "out" / "tokenizer.json").read_bytes())


def test_the_tokenizer_is_not_trained_on_held_out_text(config, tmp_path):
    # Every held-out document says zyzzyva; no merge can know it if none of them is seen.
    texts = [f"{text} zyzzyva" if is_validation(f"{text} zyzzyva", 0.2) else text for text in TEXTS]
    texts = [text for text in texts if is_validation(text, 0.2) == text.endswith("zyzzyva")]
    assert sum(text.endswith("zyzzyva") for text in texts) > 10
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert len(tokenizer.encode("zyzzyva").ids) >= 6


def test_skips_are_in_the_manifest_and_in_the_summary(config, tmp_path, capsys):
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n{\n{"text": ""}\n{\n')
    main([*config.inputs, "--output", config.output, "--vocab-size", "400", "--validation-fraction", "0.2"])
    assert load_manifest(config.output).skipped == {"empty": 1, "malformed": 2, "undecodable": 1}
    assert "skipped: 1 empty, 2 malformed, 1 undecodable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [(["--strict"], True), (["--max-skipped", "0"], True), (["--max-skipped", "1"], False), ([], False)],
)
def test_what_may_be_skipped_is_a_setting_and_more_is_an_error(config, tmp_path, capsys, allowed, refused):
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b"{\n")
    command = ["prep", *config.inputs, "--output", config.output, "--vocab-size", "400", *allowed]
    assert command_line(command) == (2 if refused else 0)
    assert ("more than the 0 of --max-skipped" in capsys.readouterr().err) == refused == nothing_left(tmp_path)


def nothing_left(tmp_path) -> bool:
    """Whether there is nothing but the input, and units that are finished."""
    return {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out.units"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "skipped: none"), ("{\n\n{\n", "skipped: 2 malformed"), ('{"text": " "}\n', "skipped: 1 empty")],
)
def test_an_empty_corpus_is_refused(config, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=f"no documents in .*{message}") as error:
        prepare(config)
    assert "\n" not in str(error.value) and nothing_left(tmp_path)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no documents"):
        prepare(PrepConfig(inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out")))


def test_nothing_to_train_on_names_the_flag(config, tmp_path):
    held_out = next(text for text in TEXTS if is_validation(text, 0.2))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": held_out}))
    with pytest.raises(DataError, match=r"all 1 documents .*--validation-fraction"):
        prepare(config)
    assert nothing_left(tmp_path)


def test_nothing_held_out_is_said(config, tmp_path, caplog):
    kept = next(text for text in TEXTS if not is_validation(text, 0.2))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": kept}))
    with caplog.at_level(logging.WARNING):
        assert prepare(config).splits["validation"].tokens == 0
    assert any("--validation-fraction" in record.getMessage() for record in caplog.records)


def test_an_existing_corpus_is_kept_without_overwrite(config):
    before = prepare(config)
    with pytest.raises(DataError, match=r"already holds a prepared corpus.*--overwrite"):
        prepare(dataclasses.replace(config, vocab_size=300))
    assert load_manifest(config.output) == before
    assert prepare(dataclasses.replace(config, vocab_size=300, overwrite=True)).vocab_size == 300
    assert load_manifest(config.output, check_hashes=True).vocab_size == 300


def test_a_folder_with_other_files_is_never_replaced(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="is not a prepared corpus"):
        prepare(dataclasses.replace(config, overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_is_used(config, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(config) == load_manifest(config.output)


def test_a_full_disk_is_one_line_and_leaves_nothing(config, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes fail in the middle of a file, as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot write .*--output") as error:
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and nothing_left(tmp_path)


def test_a_full_disk_while_overwriting_keeps_the_old_corpus(config, tmp_path, monkeypatch):
    before = prepare(config)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(dataclasses.replace(config, overwrite=True))
    assert load_manifest(config.output, check_hashes=True) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "out.units"]


def test_an_interrupt_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("based_megatron.data_prep.prepare.make_manifest", lambda **kwargs: interrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("validation_fraction", 1.0, "--validation-fraction"),
        ("validation_fraction", -0.1, "--validation-fraction"),
        ("block_tokens", 0, "--block-tokens"),
        ("block_tokens", 2**40, "--block-tokens 1099511627776 is more .* at most 268435456"),
        ("max_skipped", -1, "--max-skipped is -1"),
        ("shard_blocks", 0, "--shard-blocks"),
        ("tasks", -1, "--tasks is -1"),
        ("unit_bytes", 0, "--unit-bytes"),
        ("executor", "ray", "--executor ray cannot tell how many tasks to start: set --tasks"),
        ("train_tokenizer_bytes", 0, "--train-tokenizer-bytes"),
    ],
)
def test_impossible_settings_name_their_flag(config, field, value, flag):
    with pytest.raises(DataError, match=flag):
        prepare(dataclasses.replace(config, **{field: value}))
