"""`based data`: the documents of a step, and the commands around it."""

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from made_corpora import numbered_documents, write_corpus

from based_megatron.config import save_config
from based_megatron.config.schema import Config, DataConfig, TrainConfig
from based_megatron.data.cli import main
from based_megatron.data.documents import documents_of_step
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import load_manifest
from based_megatron.data.sources import Sources
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.errors import ConfigError, DataError
from based_megatron.monitor.events import append_event

S = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty short documents, prepared with blocks that cut them."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "in").mkdir()
    for i in range(40):
        (folder / "in" / f"{i:02d}.txt").write_text(" ".join(f"w{i}x{j}" for j in range(3 + i)))
    config = PrepConfig(inputs=(str(folder / "in"),), output=str(folder / "out"), vocab_size=300, block_tokens=500)
    prepare(dataclasses.replace(config, validation_fraction=0.2))
    return folder


def data_config(corpus) -> DataConfig:
    return DataConfig(path=str(corpus / "out"), sequence_length_tokens=S, num_workers=0, seed=3)


def test_the_parts_are_the_sequences_of_the_step(corpus):
    """Step 7 is the one after six finished ones."""
    parts = list(documents_of_step(Sources(data_config(corpus)), 7, 6))
    (batch,) = Loader(Sources(data_config(corpus), 6), data_config(corpus), 6, 6).micro_batches(6)
    assert batch.documents is not None
    for row, ids in enumerate(batch.documents.numbers(torch.arange(S))):
        tokens: Counter[int] = Counter()
        for part in (part for part in parts if part.sequence == row):
            tokens[part.document] += part.tokens  # a document that crosses blocks has a part in each
        assert list(tokens.values()) == ids.bincount().tolist()
        numbers = list(tokens)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_origin_names_the_file_of_the_text(corpus):
    parts = [part for step in range(1, 6) for part in documents_of_step(Sources(data_config(corpus)), step, 6)]
    checked = 0
    for part in parts:
        text = (corpus / part.origin.removesuffix(":1")).read_text()
        assert part.preview.replace("<|endoftext|>", "") in text
        checked += len(part.preview) > 6
    assert checked > 20


@pytest.mark.parametrize("lengths", [[S - 1] * 40, [2 * S - 1] * 20, [5, 90, 3, 3, 200, 1, 60, 70, 80, 90]])
def test_documents_keep_their_number_in_every_block(tmp_path, lengths):
    documents = numbered_documents(lengths)
    write_corpus(tmp_path / "c", documents, block_tokens=200)
    number_of = {int(token): number for number, document in enumerate(documents) for token in document[:-1]}
    sources = Sources(DataConfig(path=str(tmp_path / "c"), sequence_length_tokens=S, num_workers=0))
    reader = sources.train[0]
    sequences = [sequence for _, sequence in sources.locate(np.arange(len(reader)))]
    expected, found = [], []
    for place, sequence in enumerate(sequences):
        numbers = [number_of[int(token)] for token in reader.tokens(sequence)[:-1] if int(token) in number_of]
        expected += [(place, number) for number in sorted(set(numbers))]
    for part in documents_of_step(sources, 1, len(reader)):
        assert part.origin == f"made.txt:{part.document + 1}"
        assert part.tokens >= 1
        if part.tokens > 1:  # a part of one token may be an eos alone, which has no number to tell it by
            found.append((part.sequence, part.document))
    assert len(found) > 20 and set(found) <= set(expected)


def test_at_lists_one_line_for_each_part(corpus, capsys):
    flags = f"--path {corpus / 'out'} --global-batch-sequences 6 --sequence-length-tokens {S} --seed 3 --step 7"
    main(["at", *flags.split()])
    lines = capsys.readouterr().out.splitlines()
    parts = list(documents_of_step(Sources(data_config(corpus)), 7, 6))
    assert len(lines) == 1 + len(parts)
    assert lines[1].split("\t")[3:6] == [str(parts[0].document), parts[0].origin, str(parts[0].tokens)]


def test_steps_count_from_one(corpus, capsys):
    """As in logs, errors and names of checkpoints: the first step is 1, and the default."""
    flags = f"--path {corpus / 'out'} --global-batch-sequences 6 --sequence-length-tokens {S} --seed 3"
    main(["at", *flags.split()])
    first = capsys.readouterr().out
    main(["at", *flags.split(), "--step", "1"])
    assert capsys.readouterr().out == first
    (batch,) = Loader(Sources(data_config(corpus), 6), data_config(corpus), 6, 6).micro_batches(0)
    tokens: Counter[tuple[str, str]] = Counter()
    for line in first.splitlines()[1:]:
        sequence, _, _, document, _, count, *_ = line.split("\t")
        tokens[sequence, document] += int(count)
    numbers = batch.documents.numbers(torch.arange(S))
    assert list(tokens.values()) == [count for ids in numbers for count in ids.bincount().tolist()]


def test_at_reads_the_config_of_a_run(corpus, capsys):
    config = Config(data=data_config(corpus), train=TrainConfig(global_batch_sequences=6))
    run = corpus / "run"
    run.mkdir(exist_ok=True)
    values = dataclasses.asdict(config)
    values["data"]["sources"] = []
    values["monitor"]["sample_prompts"] = list(values["monitor"]["sample_prompts"])
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    main(["at", "--run", str(run), "--step", "7"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(
        list(documents_of_step(Sources(data_config(corpus)), 7, 6))
    )


def test_at_lists_a_run_from_before_sequences_crossed_blocks_as_it_was(corpus, tmp_path, capsys):
    config = Config(data=data_config(corpus), train=TrainConfig(global_batch_sequences=6))
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  cross_blocks: true\n", ""))
    main(["at", "--run", str(tmp_path), "--step", "7"])
    found = [line.split("\t")[2:6] for line in capsys.readouterr().out.splitlines()[1:]]
    before, now = (
        [
            [part.member, str(part.document), part.origin, str(part.tokens)]
            for part in documents_of_step(Sources(dataclasses.replace(config.data, cross_blocks=on)), 7, 6)
        ]
        for on in (False, True)
    )
    assert found == before != now


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([("start", []), ("rollback", [[4, 9]])], 12),
        ([("rollback", [[4, 9]]), ("resume", [])], 7),
        ([("rollback", [[4, 9]]), ("resume", [[4, 9], [6, 20]]), ("skip", None)], 21),
        ([("rollback", [[7, 9]])], 7),
    ],
)
def test_at_knows_what_a_rollback_has_stepped_over(corpus, tmp_path, capsys, events, expected):
    """The newest word of the events counts. --data-step is the step of the order itself."""
    save_config(Config(data=data_config(corpus), train=TrainConfig(global_batch_sequences=6)), tmp_path / "config.yaml")
    for name, jumps in events:
        append_event(tmp_path / "events.jsonl", {"event": name, "step": 5, "data_jumps": jumps})
    main(["at", "--run", str(tmp_path), "--step", "7"])
    found = capsys.readouterr().out
    main(["at", "--run", str(tmp_path), "--data-step", str(expected)])
    assert capsys.readouterr().out == found
    parts = list(documents_of_step(Sources(data_config(corpus)), expected, 6))
    assert [line.split("\t")[4] for line in found.splitlines()[1:]] == [part.origin for part in parts]


def test_the_documents_of_a_step_in_short(tmp_path):
    """Source, first and last document of each of the first sequences."""
    write_corpus(tmp_path / "c", numbered_documents([5, 90, 3, 3, 200, 1, 60, 70, 80, 90] * 5), block_tokens=200)
    data = DataConfig(path=str(tmp_path / "c"), sequence_length_tokens=S, num_workers=0)
    for joined in (False, True):
        changed = dataclasses.replace(data, carry_state=joined)
        found = Loader(Sources(changed, 10), changed, 10, 2).documents(2)
        parts = list(documents_of_step(Sources(changed, 10), 3, 10))
        assert len(found) == 8 < 10
        for place, name in enumerate(found):
            numbers = [part.document for part in parts if part.sequence == place]
            first, last = min(numbers), max(numbers)
            assert name == (f"c:{first}-{last}" if last > first else f"c:{first}")


def test_verify_passes_and_then_finds_a_flipped_byte(corpus, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(corpus / "out", copy)
    main(["verify", "--path", str(copy)])
    assert "every sample matches" in capsys.readouterr().out
    member = load_manifest(copy).splits["train"].members[0]
    data = bytearray((copy / member.file).read_bytes())
    data[member.offset] ^= 1
    (copy / member.file).write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        main(["verify", "--path", str(copy)])


def test_show_counts_documents_and_tokens(corpus, capsys):
    main(["show", "--path", str(corpus / "out")])
    split = load_manifest(corpus / "out").splits["train"]
    assert f"train: {split.documents:,} documents, {split.tokens:,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--run a --path b", "--path a --step 0"])
def test_what_to_look_at_must_be_clear(flags):
    with pytest.raises(ConfigError, match="--"):
        main(flags.split())
