"""Reading documents: every format, and everything that can be wrong with one."""

import bz2
import gzip
import json
import logging
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import WARNINGS_PER_REASON, Corpus, Skips
from based_megatron.data_prep.formats.base import Format, Skip
from based_megatron.data_prep.formats.compression import READ_BYTES
from based_megatron.errors import DataError

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(*inputs, **options):
    """({(file, record): text}, skip counts) of the inputs."""
    config = PrepConfig(inputs=tuple(map(str, inputs)), output="unused", **options)
    skips = Skips()
    documents = {(document.file, document.record): document.text for document in Corpus(config).documents(skips)}
    return documents, dict(skips.counts)


def jsonl(*texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo é\n".encode())
    assert read(tmp_path / "a.txt") == ({("a.txt", 1): "one\r\n\r\ntwo é\n"}, {})


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read(tmp_path / "a.txt")[0] == {("a.txt", 1): "one"}


@pytest.mark.parametrize(
    ("separator", "content"),
    [("", "\n\na\nb\n\n \nc"), ("<|endoftext|>", "a\nb\n<|endoftext|>\nc")],
)
def test_a_separator_line_cuts_a_text_file(tmp_path, separator, content):
    (tmp_path / "a.txt").write_text(content)
    assert read(tmp_path / "a.txt", separator=separator)[0] == {("a.txt", 1): "a\nb\n", ("a.txt", 2): "c"}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_lines_of_json_are_documents_whatever_the_compression(tmp_path, kind, ending):
    compress = COMPRESS.get(ending, bytes)
    path = tmp_path / f"a{kind}{ending}"
    path.write_bytes(compress(jsonl("one", "two\nlines") + b"\n") + compress(jsonl("three")))
    name = path.name
    assert read(path) == ({(name, 1): "one", (name, 2): "two\nlines", (name, 4): "three"}, {})


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_what_is_in_a_file_decides_how_it_is_decompressed(tmp_path, ending):
    (tmp_path / "a.jsonl.gz").write_bytes(COMPRESS.get(ending, bytes)(jsonl("one")))
    assert read(tmp_path / "a.jsonl.gz") == ({("a.jsonl.gz", 1): "one"}, {})


@pytest.mark.parametrize("separator", [None, ""])
def test_compressed_text_is_text(tmp_path, separator):
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"one\n\ntwo"))
    documents, _ = read(tmp_path / "a.txt.xz", separator=separator)
    assert list(documents.values()) == (["one\n\ntwo"] if separator is None else ["one\n", "two"])


@pytest.mark.parametrize(
    ("content", "texts", "skipped"),
    [
        ('{\n "text": "one"\n}', ["one"], {}),
        ('[{"text": "one"},\n {"other": 1}, {"text": "three"}]', ["one", "three"], {"malformed": 1}),
        ("[\n", [], {"malformed": 1}),
        ('\ufeff{"text": "one"}\n{"text": "two"}\n', ["one", "two"], {}),
        ('{"text": "one"}\n{cut}\n', ["one"], {"malformed": 1}),
        ("", [], {"malformed": 1}),
    ],
)
def test_a_json_document_is_a_record_or_a_list_of_records(tmp_path, content, texts, skipped):
    (tmp_path / "a.json").write_text(content)
    documents, counts = read(tmp_path / "a.json")
    assert list(documents.values()) == texts and counts == skipped


def test_a_key_with_points_leads_into_objects_unless_it_is_there_as_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "in"}}\n{"a.b": "as it is", "a": {"b": "in"}}\n{"a": "no object"}\n')
    documents, skipped = read(tmp_path / "a.jsonl", text_key="a.b")
    assert list(documents.values()) == ["in", "as it is"] and skipped == {"malformed": 1}


def test_a_key_with_points_leads_into_structs_of_parquet(tmp_path):
    rows = pyarrow.array([{"b": "one", "c": 1}, None, {"b": None, "c": 2}, {"b": "four", "c": 3}])
    pyarrow.parquet.write_table(pyarrow.table({"a": rows, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    documents, skipped = read(tmp_path / "a.parquet", text_key="a.b")
    assert documents == {("a.parquet", 1): "one", ("a.parquet", 4): "four"} and skipped == {"malformed": 2}


def test_rows_of_parquet_are_documents(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": [1, 2, 3], "body": ["one", None, "three"]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    documents, skipped = read(path, text_key="body")
    assert documents == {("a.parquet", 1): "one", ("a.parquet", 3): "three"} and skipped == {"malformed": 1}


@pytest.mark.parametrize(
    ("table", "text_key", "message"),
    [
        ({"body": ["one"]}, "text", r"z\.parquet has no column 'text', only body: set --text-key"),
        ({"a": [{"c": "one"}]}, "a.b", r"no column 'a\.b', only a"),
        ({"text": [1]}, "text", "holds int64 and no text: set --text-key"),
    ],
)
def test_parquet_without_a_column_of_texts_is_refused_before_anything_is_read(tmp_path, table, text_key, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl("one"))
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "z.parquet")
    with pytest.raises(DataError, match=message):
        Corpus(PrepConfig(inputs=(str(tmp_path),), output="unused", text_key=text_key))


def test_a_column_of_categories_is_text(tmp_path):
    text = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet")[0].values()) == ["one", "two", "one"]


def test_undecodable_parquet_row_leaves_the_others(tmp_path):
    data = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    documents, skipped = read(tmp_path / "a.parquet")
    assert list(documents.values()) == ["one", "three"] and skipped == {"undecodable": 1}


def test_a_folder_is_searched_for_all_kinds_but_hidden_ones(tmp_path):
    root = tmp_path / "root"
    for name in ("a.txt", "deep/b.py", "deep/c.jsonl", "d.exe", ".git/e.txt", "deep/.f.txt", "G.TXT"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jsonl("x") if name.endswith("jsonl") else b"x")
    assert {file for file, _ in read(root)[0]} == {"root/a.txt", "root/deep/b.py", "root/deep/c.jsonl", "root/G.TXT"}


def test_suffixes_replace_the_list_and_those_with_a_plus_are_added_to_it(tmp_path):
    for name in ("a.exe", "b.txt", "c.log.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"--suffixes \+\.ENDING"):
        read(tmp_path / "a.exe")
    top = tmp_path.name
    for suffixes, names in (
        ((".exe",), {"a.exe"}),
        (("+.exe", "+.log"), {"a.exe", "b.txt", "c.log.gz"}),
        ((".exe", "+.log"), {"a.exe", "c.log.gz"}),
    ):
        assert {file for file, _ in read(tmp_path, suffixes=suffixes)[0]} == {f"{top}/{name}" for name in names}


def test_what_is_passed_over_is_said_before_anything_is_read(tmp_path, caplog):
    for name in ("a.txt", "b.exe", "c.exe", "Makefile", ".hidden.exe"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    Corpus(PrepConfig(inputs=(str(tmp_path),), output="unused"))
    assert [record.getMessage() for record in caplog.records] == [
        "left out 4 files: 2 .exe, 1 Makefile, 1 .txt; --suffixes +.ENDING reads more endings as plain text"
    ]


def test_inputs_that_overlap_are_read_once_and_it_is_said(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "in" / "a.txt")
    documents, _ = read(tmp_path / "in", tmp_path / "in" / "a.txt", tmp_path)
    assert documents == {("in/a.txt", 1): "one"}
    assert "4 files were found more than once" in caplog.text


def test_files_of_one_name_have_origins_of_their_own(tmp_path):
    for folder in ("x/in", "y/in", "z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
    documents, _ = read(tmp_path / "x" / "in", tmp_path / "y" / "in", tmp_path / "z" / "a.txt")
    assert documents == {("x/in/a.txt", 1): "x/in", ("y/in/a.txt", 1): "y/in", ("a.txt", 1): "z"}
    files, _ = read(tmp_path / "x" / "in" / "a.txt", tmp_path / "y" / "in" / "a.txt")
    assert set(files) == {("x/in/a.txt", 1), ("y/in/a.txt", 1)}


def test_links_to_folders_are_followed_and_a_circle_ends(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.txt").write_text("one")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    assert read(tmp_path / "in")[0] == {("in/linked/a.txt", 1): "one"}


def test_the_output_and_its_workplace_are_no_input(tmp_path):
    for folder in ("out", "out.tmp", "in"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.json").write_bytes(jsonl(folder))
    corpus = Corpus(PrepConfig(inputs=(str(tmp_path),), output=str(tmp_path / "out")))
    assert [document.text for document in corpus.documents(Skips())] == ["in"]


def test_a_missing_input_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")


def test_undecodable_files_and_parts_are_skipped_with_a_warning(tmp_path, caplog):
    (tmp_path / "bad.txt").write_bytes(b"ok\n\nb\xffd\n\nfine")
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9")
    with caplog.at_level(logging.WARNING):
        documents, skipped = read(tmp_path / "bad.txt", tmp_path / "bad.py", separator="")
    assert list(documents.values()) == ["ok\n", "fine"] and skipped == {"undecodable": 2}
    assert sorted(record.getMessage() for record in caplog.records) == [
        "skipped bad.py:1 (undecodable): not UTF-8 at byte 5",
        "skipped bad.txt:2 (undecodable): not UTF-8 at byte 1",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "malformed"),
        (b'{"other": "x"}', "malformed"),
        (b'{"text": 3}', "malformed"),
        (b'{"text": null}', "malformed"),
        (b'["text"]', "malformed"),
        (b"3", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"text": "\xff"}', "undecodable"),
        (b'{"text": "\\ud800"}', "undecodable"),
        (b'{"text": " "}', "empty"),
    ],
)
def test_a_bad_jsonl_line_is_counted_and_the_others_are_kept(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("one") + line + b"\n" + jsonl("three"))
    assert read(path) == ({("a.jsonl", 1): "one", ("a.jsonl", 3): "three"}, {reason: 1})


def test_more_skips_than_allowed_end_the_run_and_empty_ones_do_not_count():
    skips = Skips(most=3)
    skips.counts["empty"] += 9
    skips.add("damaged", "a:1", "lost", 2)
    skips.add("malformed", "a:9", "not JSON")
    with pytest.raises(
        DataError, match=r"4 skipped, more than the 3 of --max-skipped, when b:7 was \(malformed: cut\)"
    ):
        skips.add("malformed", "b:7", "cut")


def test_the_warning_names_file_and_line(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("one") + b"{\n")
    read(path)
    assert caplog.records[0].getMessage().startswith("skipped a.jsonl:2 (malformed): not JSON")


def test_warnings_do_not_flood(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * (WARNINGS_PER_REASON + 30))
    assert read(path)[1] == {"malformed": WARNINGS_PER_REASON + 30}
    assert len(caplog.records) == WARNINGS_PER_REASON
    assert "only counted" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("name", "reason"), [("a.jsonl.gz", "malformed"), ("a.parquet", "unreadable")])
def test_a_file_that_is_not_what_its_name_says_is_skipped(tmp_path, name, reason, caplog):
    (tmp_path / name).write_bytes(b"this is no such file, whatever it is called")
    (tmp_path / "b.txt").write_text("fine")
    documents, skipped = read(tmp_path / name, tmp_path / "b.txt")
    assert list(documents.values()) == ["fine"] and skipped == {reason: 1}
    assert name in caplog.records[0].getMessage()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_cut_inside_of_a_member_gives_what_can_be_read_and_is_counted(tmp_path, ending):
    lines = jsonl(*(f"document {i} {random.Random(i).random()}" for i in range(20_000)))
    data = COMPRESS[ending](lines)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data[: len(data) // 2])
    documents, skipped = read(path)
    assert 2_000 < len(documents) < 18_000 and skipped == {"unreadable": 1}
    assert [record for _, record in documents] == list(range(1, len(documents) + 1))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kept_bytes", [1, 3, 10])
def test_a_file_cut_in_the_head_of_its_second_member_is_counted(tmp_path, ending, kept_bytes, caplog):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](jsonl("one", "two")) + COMPRESS[ending](jsonl("three"))[:kept_bytes])
    documents, skipped = read(path)
    assert list(documents.values()) == ["one", "two"] and skipped == {"unreadable": 1}
    assert "what follows on its first 2 records is lost: it is cut off" in caplog.text


@pytest.mark.parametrize("ending", COMPRESS)
def test_garbage_behind_a_member_costs_nothing_before_it_and_is_named_in_bytes(tmp_path, ending, caplog):
    texts = [f"document {i} {random.Random(i).random()}" for i in range(3000)]
    data = COMPRESS[ending](jsonl(*texts))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data + b"garbage" * 3)
    documents, skipped = read(path)
    assert list(documents.values()) == texts and skipped == {"unreadable": 1, "unreadable bytes": 21}
    assert f"its first 3,000 records is lost, 21 of {len(data) + 21:,} bytes" in caplog.text


@pytest.mark.parametrize("padding", [1, 512, 40_000])
def test_zeros_between_and_behind_members_are_no_damage(tmp_path, padding):
    zeros = bytes(padding)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("one")) + zeros + gzip.compress(jsonl("two")) + zeros)
    documents, skipped = read(path)
    assert list(documents.values()) == ["one", "two"] and skipped == {}


def test_a_zst_with_a_skippable_frame_is_whole(tmp_path):
    compress, skippable = COMPRESS[".zst"], b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + compress(jsonl("one")) + skippable + compress(jsonl("two")))
    documents, skipped = read(path)
    assert list(documents.values()) == ["one", "two"] and skipped == {}


def test_damage_inside_of_a_gzip_keeps_what_is_before_it(tmp_path):
    texts = [f"document {i} {random.Random(i).random()}" for i in range(20_000)]
    data = bytearray(gzip.compress(jsonl(*texts)))
    half = len(data) // 2
    data[half : half + 2000] = bytes(2000)
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    documents, skipped = read(tmp_path / "a.jsonl.gz")
    found = list(documents.values())
    assert found[:8000] == texts[:8000] and skipped["unreadable"] == 1
    assert 0 < skipped["unreadable bytes"] <= half + READ_BYTES


def test_a_damaged_page_of_parquet_costs_the_rest_of_its_row_group_alone(tmp_path, caplog):
    path = tmp_path / "a.parquet"
    texts = [f"row {i}" for i in range(1, 31)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    documents, skipped = read(path)
    assert documents == {("a.parquet", i): f"row {i}" for i in range(1, 31) if not 11 <= i <= 20}
    assert skipped == {"damaged": 10} and "skipped a.parquet:11 (damaged): 10 rows" in caplog.text


def test_file_order_follows_from_the_seed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(str(i))
    orders = [list(read(tmp_path, seed=seed)[0].values()) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0], key=int) and sorted(orders[0]) == sorted(orders[2])


def test_bytes_read_ends_at_the_total(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl("one", "two")))
    (tmp_path / "b.txt").write_text("x" * 1000)
    corpus = Corpus(PrepConfig(inputs=(str(tmp_path),), output="unused"))
    seen = [corpus.bytes_read for _ in corpus.documents(Skips())]
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert seen == sorted(seen) and corpus.bytes_read == corpus.total_bytes == on_disk


def test_a_format_is_one_value_that_the_corpus_reads_with(tmp_path):
    """A format as docs/extending.md describes it: endings, a reader, and the errors that end a file."""

    def read_rows(raw, name, config):
        for number, line in enumerate(raw, start=1):
            if line == b"broken\n":
                raise ArithmeticError("no more rows")
            key, _, text = line.decode().partition("\t")
            yield number, text if key == config.text_key else Skip("malformed", f"no {config.text_key!r}")

    tsv = Format((".tsv",), read_rows, (ArithmeticError,))
    (tmp_path / "A.TSV").write_text("text\tone\nother\ttwo\ntext\t \ntext\tfour\nbroken\ntext\tsix\n")
    (tmp_path / "b.txt").write_text("not of this format")
    skips = Skips()
    documents = list(Corpus(PrepConfig(inputs=(str(tmp_path),), output="unused"), [tsv]).documents(skips))
    assert [(d.file, d.record, d.text) for d in documents] == [
        (f"{tmp_path.name}/A.TSV", 1, "one\n"),
        (f"{tmp_path.name}/A.TSV", 4, "four\n"),
    ]
    assert skips.counts == {"malformed": 1, "empty": 1, "unreadable": 1}


def test_an_unknown_ending_names_the_known_ones(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(
        DataError, match=r"a\.csv has none of the known endings \(\.jsonl .*\.parquet \.txt .*--suffixes"
    ):
        read(tmp_path / "a.csv")
