"""Small corpora whose every token is known, written by the code of `based prep`."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Tokenizer, models

from based_megatron.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    blocks_name,
    fingerprint,
    load_manifest,
    make_manifest,
    save_manifest,
)
from based_megatron.data_prep.shards import SplitWriter, TokenizedDocument

EOS = 0
VOCAB_SIZE = 1 << 17


def numbered_documents(lengths: Sequence[int], first: int = 1) -> list[np.ndarray]:
    """Documents of these many tokens and an eos; the tokens count up from `first`, so that each is unique."""
    documents = []
    for length in lengths:
        documents.append(np.array([*range(first, first + length), EOS], np.uint32))
        first += length
    return documents


def random_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Document lengths between 0 and longest."""
    return [random.Random(f"{seed}/{i}").randint(0, longest) for i in range(count)]


def write_corpus(
    folder: Path,
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray] = (),
    block_tokens: int = 1 << 12,
    shard_blocks: int = 2,
) -> Manifest:
    """Write documents, in this order, as a prepared corpus of uint32 tokens."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
    splits = {}
    for name, documents in (("train", train), ("validation", validation)):
        writer = SplitWriter(folder, name, np.dtype("<u4"), block_tokens, shard_blocks)
        for i, document in enumerate(documents):
            writer.add(TokenizedDocument(document, "made.txt", i + 1))
        splits[name] = writer.close()
    manifest = make_manifest(
        tokenizer_xxh3=xxhash.xxh3_128_hexdigest((folder / "tokenizer.json").read_bytes()),
        vocab_size=VOCAB_SIZE,
        dtype="uint32",
        eos_id=EOS,
        splits=splits,
        skipped={},
        folder=folder,
    )
    save_manifest(manifest)
    return manifest


def as_version(manifest: Manifest, version: int) -> Manifest:
    """The corpus with the manifest that an earlier version wrote: all of it JSON. 2 has no hash of the hashes of pieces, 1 has no word
    of these."""
    unknown: set[str] = {"hashes_xxh3"} if version < 3 else set()
    if version < 2:
        unknown |= {"hashed_end", "hashes_offset"}
    values = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    values["splits"] = {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "members": [
                {
                    key: ("" if key == "hashes_xxh3" else 0) if key in unknown else value
                    for key, value in vars(member).items()
                }
                for member in split.members
            ],
        }
        for name, split in manifest.splits.items()
    }
    folder, _ = values.pop("folder"), values.pop("remote")
    values = json.loads(json.dumps({**values, "version": version}))
    values["fingerprint"] = fingerprint(values)
    (folder / MANIFEST_NAME).write_text(json.dumps(values, indent=1))
    for name in manifest.splits:
        (folder / blocks_name(name)).unlink(missing_ok=True)
    return load_manifest(folder)
