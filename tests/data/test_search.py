"""What `based data` finds and shows: documents whole, strings with the steps that read them, steps as text, surveys."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import numbered_documents, random_lengths, write_corpus
from tokenizers import Tokenizer

from based_megatron.config.schema import Config, DataConfig, TrainConfig
from based_megatron.data.cli import main
from based_megatron.data.jumps import DataJumps
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import load_manifest
from based_megatron.data.reader import Piece, SequenceReader
from based_megatron.data.search import find
from based_megatron.data.sources import Sources
from based_megatron.data.step_text import lines_of_step, ranges
from based_megatron.data.survey import doubling_bins, survey
from based_megatron.data.survey_page import page
from based_megatron.data.texts import documents_of_block
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.errors import ConfigError

S, BATCH = 32, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty short documents, two of them twice, in blocks that cut them."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "in").mkdir()
    for i in range(40):
        (folder / "in" / f"{i:02d}.txt").write_text(" ".join(f"w{i}ü{j}" for j in range(3 + i)))
    for i in (7, 30):
        (folder / "in" / f"copy{i}.txt").write_text((folder / "in" / f"{i:02d}.txt").read_text())
    (folder / "in" / "tags.txt").write_text("<script>alert('&')</script> " * 3)
    prepare(
        PrepConfig(
            inputs=(str(folder / "in"),),
            output=str(folder / "out"),
            vocab_size=300,
            block_tokens=500,
            validation_fraction=0,
        )
    )
    return folder


def settings_of(corpus, **changes) -> DataConfig:
    data = DataConfig(path=str(corpus / "out"), sequence_length_tokens=S, num_workers=0, seed=3)
    return dataclasses.replace(data, **changes)


@pytest.mark.parametrize("lengths", [[99] * 20, [5, 90, 3, 3, 950, 1, 60, 70, 80, 90], random_lengths(60, 40)])
def test_documents_are_whole_however_blocks_cut_them(tmp_path, lengths):
    documents = numbered_documents(lengths)
    reader = SequenceReader(write_corpus(tmp_path / "c", documents, block_tokens=100), "train", 1)
    found = [document for block in range(len(reader.members)) for document in documents_of_block(reader, block)]
    assert [document.tokens.tolist() for document in found] == [document.tolist() for document in documents]
    assert [document.number for document in found] == list(range(len(documents)))
    assert [document.origin for document in found] == [f"made.txt:{i + 1}" for i in range(len(documents))]
    for document in found:
        for begin, end in ((0, len(document.tokens)), (len(document.tokens) // 3, len(document.tokens) // 2 + 1)):
            parts = [reader.part(piece) for piece in document.between(begin, end)]
            assert np.concatenate(parts).tolist() == document.tokens[begin:end].tolist()


@pytest.mark.parametrize("joined", [False, True])
def test_the_sequences_with_a_piece_are_those_that_read_it(tmp_path, joined):
    manifest = write_corpus(tmp_path / "c", numbered_documents(random_lengths(60, 40)), block_tokens=150)
    reader = SequenceReader(manifest, "train", S, joined=joined)
    inputs = {
        sequence: {
            (piece.member, place) for piece in reader.pieces(sequence, 0, S) for place in range(piece.start, piece.stop)
        }
        for sequence in range(len(reader))
    }
    for member in range(len(reader.members)):
        for start, stop in (
            (0, 1),
            (3, 40),
            (S - 1, S + 1),
            (reader.members[member].tokens - 1, reader.members[member].tokens),
        ):
            stop = min(stop, reader.members[member].tokens)
            wanted = {(member, place) for place in range(start, stop)}
            expected = [sequence for sequence, places in inputs.items() if places & wanted]
            if start < stop:
                assert list(reader.sequences_with(Piece(member, start, stop))) == expected


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), max_size=3, unique_by=lambda pair: pair[0]))
def test_the_steps_of_a_data_step_are_those_that_train_on_it(pairs):
    jumps = DataJumps(tuple(sorted(pairs)))
    for data_step in range(40):
        assert (
            jumps.steps_of(data_step)
            == [step for step in range(80) if jumps.data_step(step) == data_step][: len(pairs) + 1]
        )


@pytest.mark.parametrize("cross_blocks", [True, False])
@pytest.mark.parametrize("text", ["w17ü5 ", "ü3 w7ü4 w7", "w39ü41", "ü9 w2"])
def test_a_string_is_found_with_all_steps_that_read_it(corpus, text, cross_blocks):
    sources, steps = Sources(settings_of(corpus, cross_blocks=cross_blocks)), 40
    reader, tokenizer = sources.train[0], Tokenizer.from_file(str(corpus / "out" / "tokenizer.json"))
    found = list(find(sources, text, steps, BATCH))
    expected = []
    for block in range(len(reader.members)):
        for document in documents_of_block(reader, block):
            written = (corpus / document.origin.removesuffix(":1")).read_text()
            offsets = tokenizer.encode(written).offsets
            for match in re.finditer(f"(?={re.escape(text)})", written):
                at, end = match.start(), match.start() + len(text)
                mine = [place for place, (first, last) in enumerate(offsets) if first < end and last > at]
                pieces = document.between(mine[0], mine[-1] + 1)
                places = {(piece.member, place) for piece in pieces for place in range(piece.start, piece.stop)}
                expected.append((document.number, document.origin, steps_that_read(sources, places, steps)))
    assert [(place.document, place.origin, place.steps) for place in found] == expected and expected
    assert all(text in place.context and place.source == str(corpus / "out") for place in found)


def steps_that_read(sources: Sources, places: set[tuple[int, int]], steps: int) -> tuple[int, ...]:
    """The steps whose inputs have one of these (member, token): the oracle looks at all of them."""
    found = []
    for step in range(steps):
        for _, sequence in sources.locate(np.arange(step * BATCH, (step + 1) * BATCH)):
            for piece in sources.train[0].pieces(sequence, 0, S):
                found += [
                    step for member, place in places if piece.member == member and piece.start <= place < piece.stop
                ]
    return tuple(sorted(set(found)))


def test_what_is_not_there_is_not_found(corpus):
    assert list(find(Sources(settings_of(corpus)), "w40ü1", 10, BATCH)) == []


def test_search_prints_steps_from_one_up_to_the_limit(corpus, capsys):
    flags = f"--path {corpus / 'out'} --global-batch-sequences {BATCH} --sequence-length-tokens {S} --seed 3"
    main(["search", "w17ü5 ", *flags.split()])
    head, line = capsys.readouterr().out.splitlines()
    (found,) = find(Sources(settings_of(corpus)), "w17ü5 ", 40, BATCH)
    assert head.split("\t")[4] == "steps" and line.split("\t")[2:4] == [str(found.document), "in/17.txt:1"]
    assert line.split("\t")[4].split(",")[0] == str(found.steps[0] + 1) and "w17ü5" in line.split("\t")[5]
    main(["search", "w", *flags.split(), "--limit", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    for wrong in (["search"], ["at", "text"]):
        with pytest.raises(ConfigError, match="search STRING"):
            main([*wrong, *flags.split()])


def test_a_step_is_shown_whole_with_its_masks(corpus, capsys):
    flags = f"--path {corpus / 'out'} --global-batch-sequences {BATCH} --sequence-length-tokens {S} --seed 3 --step 5"
    main(["show", *flags.split()])
    said = capsys.readouterr().out
    data = settings_of(corpus)
    config = Config(data=data, train=TrainConfig(global_batch_sequences=BATCH))
    assert said.splitlines() == "\n".join(lines_of_step(config, Sources(data, BATCH), 5)).splitlines()
    tokenizer = Tokenizer.from_file(str(corpus / "out" / "tokenizer.json"))
    (batch,) = Loader(Sources(data, BATCH), data, BATCH, BATCH).micro_batches(4)
    blocks = re.split(r"^=== sequence ", said, flags=re.MULTILINE)[1:]
    assert len(blocks) == BATCH
    for row, block in enumerate(blocks):
        no_loss = [int(place) for places in re.findall(r"no loss at (\S+)", block) for place in places.split(",")]
        assert no_loss == (batch.loss_mask_BL[row] == 0).nonzero().flatten().tolist()
        for begin, end in re.findall(r"^--- (\d+)-(\d+): document", block, re.MULTILINE):
            text = tokenizer.decode(batch.tokens_BL[row, int(begin) : int(end) + 1].tolist(), skip_special_tokens=False)
            assert text in block


def test_ranges_are_words():
    assert ranges(np.array([3, 4, 5, 9, 11, 12])) == "3-5,9,11-12" and ranges(np.array([], int)) == ""


def test_a_survey_counts_what_is_there(corpus):
    found = survey(load_manifest(corpus / "out"), 10**9)
    texts = [path.read_text() for path in sorted((corpus / "in").iterdir())]
    tokenizer = Tokenizer.from_file(str(corpus / "out" / "tokenizer.json"))
    lengths = [len(tokenizer.encode(text).ids) + 1 for text in texts]
    assert (found.sampled_documents, found.sampled_tokens) == (
        43,
        sum(lengths),
    ) and found.sampled_blocks == found.blocks
    copies = [len(tokenizer.encode((corpus / "in" / f"copy{i}.txt").read_text()).ids) + 1 for i in (7, 30)]
    assert (found.duplicates, found.duplicate_tokens) == (2, sum(copies))
    assert found.lengths == doubling_bins(lengths) and sum(count for _, count in found.lengths) == 43
    assert found.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / (sum(lengths) - 43))
    assert found.tokens_per_word == pytest.approx((sum(lengths) - 43) / sum(len(text.split()) for text in texts))
    assert (found.mean_tokens, found.median_tokens) == (pytest.approx(np.mean(lengths)), np.median(lengths))
    part = survey(load_manifest(corpus / "out"), 1000)
    assert 0 < part.sampled_blocks < found.blocks and part.sampled_documents < 43


def test_bins_double():
    assert doubling_bins([1, 2, 3, 4, 7, 8]) == ((1, 1), (2, 2), (4, 2), (8, 1))
    assert doubling_bins([5, 17]) == ((4, 1), (8, 0), (16, 1)) and doubling_bins([]) == ()


def test_the_page_needs_nothing_else_and_texts_are_no_markup(corpus, tmp_path, capsys):
    main(["report", "--path", str(corpus / "out"), "--output", str(tmp_path / "r.html")])
    written = (tmp_path / "r.html").read_text()
    assert "duplicate documents" in capsys.readouterr().out and "2/43" not in written
    assert "<td>duplicate documents</td><td>4.65%</td>" in written
    assert not re.search(r"<script|src=|href=|url\(|@import", written)
    shown = dataclasses.replace(
        survey(load_manifest(corpus / "out"), 10**9), samples=(("a<b", "<script>1 & 2</script>"),)
    )
    assert "<p>a&lt;b</p><pre>&lt;script&gt;1 &amp; 2&lt;/script&gt;</pre>" in page([shown])
    with pytest.raises(ConfigError, match=r"cannot write .*change --output"):
        main(["report", "--path", str(corpus / "out"), "--output", str(tmp_path / "no" / "r.html")])
