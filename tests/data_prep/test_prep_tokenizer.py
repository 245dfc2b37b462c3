"""Tokenizers: ids equal to those of the reference libraries, and no special token from text."""

import itertools
import json
import random
import shutil
import time

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from based_megatron.data_prep import tokenizer as tokenizer_module
from based_megatron.data_prep.tokenizer import END_OF_TEXT, cut, load_tokenizer, train_tokenizer
from based_megatron.errors import DataError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "", "lazy", "dog\n\nwhile", "12", "naïve", "火"]
WORDS += ["cats\tsleep;", "def", "f(x):\n", "", "return", "x\n"]


def text_of(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def trained():
    """A small tokenizer trained on random words."""
    return train_tokenizer([text_of(500, seed) for seed in range(4)], 320)


@pytest.mark.parametrize("form", ["folder", "vocabulary file", "merges file", "plain names"])
def test_gpt2_pair_gives_the_ids_of_transformers(shared_dir, tmp_path, form):
    data = shared_dir / "data"
    if form == "plain names":
        shutil.copy(data / "gpt2-vocab.json", tmp_path / "vocab.json")
        shutil.copy(data / "gpt2-merges.txt", tmp_path / "merges.txt")
    path = {
        "folder": data,
        "vocabulary file": data / "gpt2-vocab.json",
        "merges file": data / "gpt2-merges.txt",
        "plain names": tmp_path,
    }[form]
    encoder = load_tokenizer(str(path))
    reference = GPT2Tokenizer(str(data / "gpt2-vocab.json"), str(data / "gpt2-merges.txt"))
    names = ("wikitext2-valid.txt", "tinyshakespeare.txt") if form == "folder" else ()
    texts = [(data / name).read_text(encoding="utf-8") for name in names] + [" gazed", "\n\n x  y\r\n\tz ", "é火🙂"]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.dtype == np.uint16 and ids[-1] == encoder.eos_id == 50256 and encoder.vocab_size == 50257
        assert np.array_equal(ids[:-1], reference(text)["input_ids"])


def test_the_last_merge_is_read_without_a_final_newline(shared_dir):
    merges = (shared_dir / "data" / "gpt2-merges.txt").read_text(encoding="utf-8")
    assert not merges.endswith("\n")
    last = "".join(merges.splitlines()[-1].split()).replace("Ġ", " ")
    assert len(load_tokenizer(str(shared_dir / "data")).encode([last])[0]) == 2


def test_trained_tokenizer_round_trips_and_ends_documents(trained):
    texts = [text_of(50, 9), "unseen ☃ bytes\x00", "x"]
    tokenizer = Tokenizer.from_str(trained._json)
    for text, ids in zip(texts, trained.encode(texts), strict=True):
        assert ids[-1] == trained.eos_id == 0 and (ids[:-1] != 0).all()
        assert tokenizer.decode(ids.tolist()) == text


def test_training_is_deterministic():
    texts = [text_of(500, seed) for seed in range(4)]
    assert train_tokenizer(texts, 320)._json == train_tokenizer(texts, 320)._json


@pytest.mark.parametrize("size", [257, 300])
def test_trained_vocabulary_has_the_size_asked_for(size):
    assert train_tokenizer([text_of(500)], size).vocab_size == size


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(DataError, match="--vocab-size 256"):
        train_tokenizer(["x"], 256)


def test_a_document_that_spells_the_end_token_goes_on(trained):
    (ids,) = trained.encode([f"before{END_OF_TEXT}after"])
    assert np.flatnonzero(ids == trained.eos_id).tolist() == [len(ids) - 1]


@pytest.mark.parametrize("characters_at_a_time", [1, 200, 1 << 20])
def test_pieces_give_the_ids_of_the_whole(trained, monkeypatch, characters_at_a_time):
    texts = [text_of(3000, 1), "", "x\n", text_of(10, 2)]
    whole = trained.encode(texts)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_AT_A_TIME", characters_at_a_time)
    assert len(list(cut(texts[0]))) > 20
    for one, other in zip(whole, trained.encode(texts), strict=True):
        assert np.array_equal(one, other)


LINES = "def f(x):\n    return x\n\n\nclass A:\n\tb = 'c'\nd\r\ne\u3000\nf don't\nÉté\n"
CHINESE = "今天天气，很好。“我们”去（公园）！你来？hello，world。don't，I'm。１２，三。"  # noqa: RUF001
# The patterns by which GPT-2 and GPT-4 split words.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", [GPT2, GPT4])
@pytest.mark.parametrize("text", [LINES, CHINESE, LINES + CHINESE])
def test_lines_and_chinese_are_cut_without_a_change_of_ids(tmp_path, monkeypatch, pattern, text):
    tokenizer = Tokenizer.from_str(train_tokenizer([text * 20], 400)._json)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_tokenizer(str(tmp_path))
    whole = tokenizer.encode(text * 9, add_special_tokens=False).ids
    lengths = []
    encode = encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda pieces: lengths.extend(map(len, pieces)) or encode(pieces))
    for piece_characters in range(1, 40, 3):
        monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", piece_characters)
        lengths.clear()
        assert encoder.encode([text * 9])[0][:-1].tolist() == whole
        assert max(lengths) < piece_characters + 60 < len(text * 9)


def test_text_without_a_place_to_cut_is_cut_all_the_same(trained, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", 80)
    text = "x" * 1000
    pieces = list(cut(text))
    assert "".join(pieces) == text and set(map(len, pieces[:-1])) == {80}
    assert Tokenizer.from_str(trained._json).decode(trained.encode([text])[0].tolist()) == text


@pytest.mark.parametrize("sign", ["a", "火", "7", "=", "_", " ", "\n"])
def test_a_word_without_an_end_does_not_stop_the_training(sign):
    # Without cuts, 20,000 signs take ten seconds, and 500,000 hours.
    begun = time.process_time()
    encoder = train_tokenizer([text_of(500), sign * 500_000], 300)
    assert encoder.vocab_size == 300 and time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("x" * 511, [511]),
        ("ab " * 900, [2700]),
        ("x" * 1025 + "=" * 600 + "7" * 512, [512, 512, 1 + 512, 88 + 512, 0]),
    ],
)
def test_long_words_are_cut_after_512_signs(text, lengths):
    parts = list(tokenizer_module._without_long_words(text))
    assert "".join(parts) == text and list(map(len, parts)) == lengths


def test_a_tokenizer_that_marks_the_start_of_a_text_gets_whole_documents(tmp_path, monkeypatch):
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "</s>": 1, "▁": 2, "a": 3}, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_tokenizer(str(tmp_path))
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 2)
    assert encoder.encode(["aa aa aa"])[0].tolist() == [2, 3, 3, 2, 3, 3, 2, 3, 3, 1]


def test_cut_loses_nothing_and_cuts_only_at_single_spaces_and_lines(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 10)
    text = text_of(500)
    pieces = list(cut(text))
    assert "".join(pieces) == text and len(pieces) > 5
    for left, right in itertools.pairwise(pieces):
        if right[0] == " ":
            assert not left[-1].isspace() and right[1].isalpha()
        else:
            assert left[-1] == "\n" and not left[-2].isspace() and right[0].isalpha()


def test_saved_folder_loads_in_transformers_and_here(trained, tmp_path):
    trained.save(tmp_path)
    text = text_of(40, 5)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, 0)
    assert theirs(text)["input_ids"] == trained.encode([text])[0][:-1].tolist()
    assert np.array_equal(load_tokenizer(str(tmp_path)).encode([text])[0], trained.encode([text])[0])
    assert load_tokenizer(str(tmp_path / "tokenizer.json"))._json == trained._json


def test_truncation_and_padding_of_a_file_are_ignored(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained._json)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = text_of(40, 5)
    assert np.array_equal(load_tokenizer(str(tmp_path)).encode([text, "x"])[0], trained.encode([text])[0])


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>"}])
def test_eos_comes_from_the_config_beside_the_tokenizer(trained, tmp_path, eos):
    tokenizer = Tokenizer.from_str(trained._json)
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_token == END_OF_TEXT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    encoder = load_tokenizer(str(tmp_path))
    assert (encoder.eos_token, encoder.eos_id, encoder.vocab_size) == ("<stop>", 320, 321)
    assert load_tokenizer(str(tmp_path), END_OF_TEXT).eos_token == END_OF_TEXT


def test_an_unknown_eos_names_the_flag(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(DataError, match=r"has no <stop> .*--eos-token"):
        load_tokenizer(str(tmp_path), "<stop>")


@pytest.mark.parametrize(("size", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_take_four_bytes_where_two_are_too_few(tmp_path, size, dtype):
    vocabulary = {END_OF_TEXT: 0} | {chr(0x10000 + i): i for i in range(1, size)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "tokenizer.json"))
    (ids,) = load_tokenizer(str(tmp_path)).encode([chr(0x10000 + size - 1)])
    assert ids.dtype == dtype and ids.tolist() == [size - 1, 0]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*vocab\.json and merges\.txt"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "nowhere" / "tokenizer.json"))


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{\n")
    with pytest.raises(DataError, match="cannot read a tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("special", [True, False])
def test_an_eos_never_comes_from_text_whatever_its_file_says(trained, tmp_path, special):
    values = json.loads(trained._json)
    values["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    encoder = load_tokenizer(str(tmp_path))
    (ids,) = encoder.encode([f"before{END_OF_TEXT}after"])
    assert np.flatnonzero(ids == encoder.eos_id).tolist() == [len(ids) - 1]
    assert encoder.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == f"before{END_OF_TEXT}after"
    assert json.loads(encoder._json)["added_tokens"][0]["special"] is special


def test_an_eos_that_the_tokenizer_makes_of_text_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(DataError, match=r"a text that spells 'a' would end its document.*--eos-token"):
        load_tokenizer(str(tmp_path), "a")
    with pytest.raises(DataError, match=r"a text that spells 'the'"):
        train_tokenizer(["the the the the"], 300, "the")


def test_a_trained_tokenizer_ends_documents_with_the_token_asked_for(tmp_path):
    encoder = train_tokenizer([text_of(500)], 300, "<stop>")
    encoder.save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    for each in (encoder, read):
        assert (each.eos_token, each.eos_id, each.vocab_size) == ("<stop>", 0, 300)
        assert each.tokenizer.token_to_id(END_OF_TEXT) is None
