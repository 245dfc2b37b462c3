"""Tokenizers, trained here or read from Hugging Face and GPT-2 files, and the encoding of text."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from based_megatron.data.batches import batches
from based_megatron.data.manifest import TOKENIZER_NAME
from based_megatron.errors import DataError

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
EOS_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
GPT2_PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))
BYTE_ALPHABET = 256
PIECE_CHARACTERS = 1 << 17
CHARACTERS_AT_A_TIME = 1 << 20
"""An encoding holds some hundred bytes a token: only those of so much text at a time."""
LONGEST_PIECE = 1 << 20
"""Text without any place to cut at is cut after so many characters, which may cost a token there."""
LETTER = r"[^\W\d_]"
EAST_ASIAN = (
    "\u2014\u2018\u2019\u201c\u201d\u2026\u3001\u3002\u300a\u300b\u300c\u300d\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
)
"""Punctuation of Chinese and Japanese."""
CUTS = {
    rf"(?<=\S)(?= {LETTER})": "It is one of the best, in the end; and it has to be (as of 1999) at the top.",
    rf"(?<=\S\n)(?={LETTER})": "It is one\nof the best,\nin the end\nand it has\nto be at the\ntop (as of\nold).\nÉ la\n火\nend",
    rf"(?<={LETTER})(?=[{EAST_ASIAN}])": "很".join(EAST_ASIAN) + "。今天天气很好、don’t",  # noqa: RUF001
}
"""Places between words at which pre-tokenizers cut in any case: a single space before a letter, a single line break before one, a letter
before punctuation of Chinese and Japanese. With each, a text that shows whether a tokenizer really does."""
LONG_WORD = re.compile(rf"{LETTER}{{512}}|\d{{512}}|(?:[^\w\s]|_){{512}}|\s{{512}}")
"""The beginning of a run of signs of one kind that no word has. The training of BPE takes time in the square of the longest."""


class Encoder:
    """A tokenizer as the shards need it: no special tokens from text, one eos at the end of each document."""

    def __init__(self, tokenizer: Tokenizer, eos_token: str):
        self.eos_token = eos_token
        self.eos_id = tokenizer.get_vocab(with_added_tokens=True)[eos_token]
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype("<u2") if self.vocab_size <= np.iinfo(np.uint16).max else np.dtype("<u4")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._json = tokenizer.to_str(pretty=True)
        # A document that spells out <|endoftext|> must not end in its middle.
        self.tokenizer = _with_special(self._json, eos_token)
        self.tokenizer.encode_special_tokens = True
        if self.eos_id in self._ids([eos_token])[0]:
            raise DataError(
                f"a text that spells {eos_token!r} would end its document, because the tokenizer makes this token of text: "
                f"set --eos-token to a special token"
            )
        self._cuts = "|".join(place for place, probe in CUTS.items() if self._cuts_at(place, probe))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text with eos appended.

        A long text is encoded in pieces, in parallel and in bounded memory, to the same ids.
        """
        pieces = [list(cut(text, self._cuts)) if self._cuts else [text] for text in texts]
        ids = iter(self._ids([piece for part in pieces for piece in part]))
        eos = np.array([self.eos_id], self.dtype)
        return [np.concatenate([*(next(ids) for _ in part), eos]) for part in pieces]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and a tokenizer_config.json with which transformers' AutoTokenizer loads the folder."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        (folder / TOKENIZER_NAME).write_text(self._json, encoding="utf-8")
        (folder / TOKENIZER_CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _cuts_at(self, place: str, probe: str) -> bool:
        """Whether the tokenizer gives the same ids to a text and to its parts between places of a kind."""
        whole, *parts = self._ids([probe, *re.split(place, probe)])
        return np.array_equal(whole, np.concatenate(parts))

    def _ids(self, pieces: list[str]) -> list[np.ndarray]:
        ids: list[np.ndarray] = []
        for batch in batches(pieces, len, CHARACTERS_AT_A_TIME):
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids.extend(np.array(encoding.ids, self.dtype) for encoding in encodings)
        return ids


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos_token: str = END_OF_TEXT) -> Encoder:
    """A byte-level BPE of `vocab_size` entries, or fewer where the text has no more pairs; the end of a document is 0."""
    if vocab_size < BYTE_ALPHABET + 1:
        raise DataError(
            f"--vocab-size {vocab_size} has no room for the {BYTE_ALPHABET} bytes and {eos_token}: "
            f"set it to {BYTE_ALPHABET + 1} or more"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for part in cut(text) for piece in _without_long_words(part))
    tokenizer.train_from_iterator(pieces, trainer)
    return Encoder(tokenizer, eos_token)


def load_tokenizer(path: str, eos_token: str = "") -> Encoder:
    """Read an HF tokenizer.json (the file or its folder) or the GPT-2 pair (the folder or one of the two).

    Raises DataError if nothing of this kind is there or the end-of-document token is unknown.
    """
    place = Path(path)
    folder, file = (place, place / TOKENIZER_NAME) if place.is_dir() else (place.parent, place)
    pair = (
        _gpt2_pair(folder)
        if not file.is_file() or file.name in (name for pair in GPT2_PAIRS for name in pair)
        else None
    )
    if not pair and not file.is_file():
        raise DataError(
            f"no tokenizer at {path}: give `train`, a {TOKENIZER_NAME}, "
            f"or a folder with it or with vocab.json and merges.txt"
        )
    try:
        tokenizer = _gpt2(*pair) if pair else Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise DataError(
            f"cannot read a tokenizer from {path}: {' '.join(str(error).split())}; give another --tokenizer"
        ) from error
    return Encoder(tokenizer, _eos(tokenizer, folder, eos_token))


def cut(text: str, places: str = "|".join(CUTS)) -> Iterator[str]:
    """Pieces of about PIECE_CHARACTERS that join to the text, cut only where pre-tokenizers cut anyway, unless there is no such place."""
    pattern = re.compile(places)
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        match = pattern.search(text, start + PIECE_CHARACTERS, start + LONGEST_PIECE)
        if match is None and len(text) - start <= LONGEST_PIECE:
            break
        end = match.start() if match else start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _without_long_words(text: str) -> Iterator[str]:
    """Parts that join to the text, cut inside of runs of one kind of sign that are no words."""
    start = 0
    for match in LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _with_special(tokenizer_json: str, token: str) -> Tokenizer:
    """The tokenizer, with one of its added tokens special, whatever its file says: only special tokens can be kept out of text."""
    values = json.loads(tokenizer_json)
    for added in values["added_tokens"]:
        added["special"] = added["special"] or added["content"] == token
    return Tokenizer.from_str(json.dumps(values))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_pair(folder: Path) -> tuple[Path, Path] | None:
    pairs = [(folder / vocabulary, folder / merges) for vocabulary, merges in GPT2_PAIRS]
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)


def _gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    tokenizer = _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _eos(tokenizer: Tokenizer, folder: Path, eos_token: str) -> str:
    named = eos_token or _configured_eos(folder)
    candidates = (named,) if named else EOS_CANDIDATES
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"the tokenizer of {folder} has no {' or '.join(candidates)} to end documents with: set --eos-token"
    )


def _configured_eos(folder: Path) -> str:
    try:
        token = json.loads((folder / TOKENIZER_CONFIG_NAME).read_text(encoding="utf-8")).get("eos_token") or ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {folder / TOKENIZER_CONFIG_NAME}: {error}; repair it or set --eos-token"
        ) from error
    return token["content"] if isinstance(token, dict) else token
