"""The tokenizer that `based prep` trains on its inputs."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence

import xxhash

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Corpus, Skips
from based_megatron.data_prep.files import InputFile
from based_megatron.data_prep.tasks import Tell
from based_megatron.data_prep.tokenizer import END_OF_TEXT, Encoder, train_tokenizer
from based_megatron.data_prep.units import is_validation

logger = logging.getLogger(__name__)

SETTINGS = (
    "vocab_size",
    "train_tokenizer_bytes",
    "eos_token",
    "text_key",
    "separator",
    "validation_fraction",
    "seed",
)
"""Settings that a trained tokenizer depends on."""


def training_key(config: PrepConfig, files: Sequence[InputFile]) -> str:
    """Key of a tokenizer that is trained on these files, as long as they are not written to."""
    values = dataclasses.asdict(config)
    places = [(file.name, str(file.path), file.size_bytes, file.mtime_ns) for file in files]
    return xxhash.xxh3_128_hexdigest(json.dumps([[values[name] for name in SETTINGS], places]).encode())


def train_on(corpus: Corpus, config: PrepConfig, tell: Tell) -> Encoder:
    """A new tokenizer, trained on the first documents of the training split."""

    def texts() -> Iterator[str]:
        left_bytes = config.train_tokenizer_bytes
        for document in corpus.documents(Skips(quiet=True)):
            if not is_validation(document.text, config.validation_fraction):
                yield document.text
                text_bytes = len(document.text.encode())
                left_bytes -= text_bytes
                tell(text_bytes, 0)
            if left_bytes <= 0:
                return

    encoder = train_tokenizer(texts(), config.vocab_size, config.eos_token or END_OF_TEXT)
    if encoder.vocab_size < config.vocab_size:
        logger.warning(
            "the text gave a tokenizer of only %d entries, not --vocab-size %d", encoder.vocab_size, config.vocab_size
        )
    return encoder
