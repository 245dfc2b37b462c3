"""What a Hugging Face export of ours has on the disk."""

import json
from pathlib import Path

import torch
from torch import Tensor

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.hf_files.configuration_based import BasedConfig
from based_megatron.convert.huggingface import from_hf
from based_megatron.convert.weights import INDEX, SAFE_NAME, read_safetensors
from based_megatron.errors import CheckpointError


def is_export(folder: Path) -> bool:
    """True if a folder is a Hugging Face export of ours."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == BasedConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False


def exported_length(folder: Path) -> int | None:
    """Tokens of a training sequence, as an export says; None if it does not. Raises CheckpointError."""
    try:
        length = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error}") from error
    return length if isinstance(length, int) and length > 0 else None


def read_export(folder: Path, mixers: str = "") -> tuple[dict[str, Tensor], ModelConfig]:
    """State dict, in float32, and config of a Hugging Face export; no code of the folder runs. Raises CheckpointError."""
    try:
        weights = read_safetensors(folder)
        if weights is None:
            raise CheckpointError(f"{folder} has neither {SAFE_NAME} nor {SAFE_NAME}{INDEX}: give a whole export")
        config = BasedConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read the export {folder}: {' '.join(str(error).split())[:200]}") from error
    return from_hf({name: tensor.to(torch.float32) for name, tensor in weights.items()}, config, mixers)
