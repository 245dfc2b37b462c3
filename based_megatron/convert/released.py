"""The layout of the released Based checkpoints: config.json and pytorch_model.bin (or model.safetensors), both ways.

Weights are read without unpickling code, and the import paths in the config are compared with known ones, never
imported.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.checksums import write_checksums
from based_megatron.convert.folder import new_folder
from based_megatron.convert.layout import Entry, our_shapes, to_other, to_ours
from based_megatron.convert.released_config import read_released_config, released_config
from based_megatron.convert.tokenizer import write_tokenizer
from based_megatron.convert.weights import PICKLE_NAME, SAFE_NAME, read_pickled, read_safetensors
from based_megatron.errors import CheckpointError
from based_megatron.model.mixers import layer_mixers

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
DECAY = "transformer.decay.decay"


def from_released(folder: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """Read a folder in the released layout as our unsharded float32 state dict and config.

    Raises CheckpointError if a file is missing or holds more than tensors, if the config asks for something that we do
    not know, and if tensors are missing, unexpected or misshapen.
    """
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {folder / CONFIG_NAME}: {error}; give a released checkpoint folder"
        ) from error
    weights = _clean(_read_weights(folder))
    mlp_rows = weights.get("transformer.layers.0.mlp.fc1.weight", torch.empty(0)).shape[0]
    config = read_released_config(values, mlp_rows)
    if config.tie_embeddings:
        alias = weights.pop("lm_head.weight", None)
        embedding = weights.get("transformer.embeddings.word_embeddings.weight")
        if alias is not None and embedding is not None and not torch.equal(alias, embedding):
            raise CheckpointError(
                f"lm_head.weight of {folder} is not the embedding, although its config has tie_word_embeddings true; "
                f"set that to false in {CONFIG_NAME}"
            )
    return to_ours(weights, _table(config)), config


def to_released(
    state_dict: dict[str, Tensor],
    config: ModelConfig,
    output: Path,
    tokenizer: Path | None = None,
    sequence_length_tokens: int | None = None,
) -> None:
    """Write config.json and pytorch_model.bin in the released layout, bit-equal, and the tokenizer, which released folders lack.

    Raises CheckpointError if the output is in the way, the tensors do not fit the config, or the released code cannot
    express the model; DataError for the tokenizer.
    """
    values = released_config(config)
    weights = to_other(state_dict, _table(config))
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["transformer.embeddings.word_embeddings.weight"]
    with new_folder(output) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2))
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder, config.vocab_size, sequence_length_tokens)
        try:
            torch.save(weights, folder / PICKLE_NAME)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(" ".join(str(error).split())[:200]) from error
        write_checksums(folder)


def _read_weights(folder: Path) -> dict[str, Any]:
    for read in (read_safetensors, read_pickled):
        if (weights := read(folder)) is not None:
            return weights
    raise CheckpointError(f"{folder} has neither {SAFE_NAME} nor {PICKLE_NAME}: give a released checkpoint folder")


def _clean(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors as float32 under their plain names: without the training wrapper's prefix, metrics and unused decay."""
    weights: dict[str, Tensor] = {}
    for key, value in raw.items():
        name = str(key).removeprefix("model.")
        if "metrics" in name:
            continue
        if name == DECAY:
            logger.warning("%s is left out: the released mixer never used it", DECAY)
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{key} is not a tensor of weights but {str(value)[:60]}; give a released checkpoint")
        if name in weights:
            raise CheckpointError(f"{name} is there twice, with and without the prefix 'model.'; remove one")
        weights[name] = value.to(torch.float32)
    return weights


def _table(config: ModelConfig) -> list[Entry]:
    """Our tensors and the released ones."""
    top = {
        "embedding.weight": "transformer.embeddings.word_embeddings.weight",
        "final_norm.weight": "transformer.ln_f.weight",
        "output.weight": "lm_head.weight",
    }
    mixers = layer_mixers(config)
    table = []
    for name, shape in our_shapes(config).items():
        if name in top:
            table.append(Entry(name, shape, ((top[name], shape),)))
            continue
        _, index, local = name.split(".", 2)
        parts: dict[str, tuple[int, ...]] = {local: shape}
        if local in ("mixer_norm.weight", "mlp_norm.weight"):
            parts = {"norm1.weight" if local.startswith("mixer") else "norm2.weight": shape}
        elif local.startswith("mixer."):
            of_mixer = mixers[int(index)].released_parts(config, local.removeprefix("mixer."))
            parts = {f"mixer.{part}": part_shape for part, part_shape in of_mixer.items()}
        prefix = f"transformer.layers.{index}"
        table.append(Entry(name, shape, tuple((f"{prefix}.{part}", part_shape) for part, part_shape in parts.items())))
    return table
