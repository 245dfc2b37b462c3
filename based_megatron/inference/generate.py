"""Continue prompts with an export or a checkpoint; decoding has a state of constant size."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from based_megatron.checkpoint.full import read_whole
from based_megatron.config.limits import check_limits, flag
from based_megatron.convert.exported import is_export, read_export
from based_megatron.convert.hf_files.modeling_based import CACHE_NAME, BasedForCausalLM
from based_megatron.convert.huggingface import hf_model
from based_megatron.convert.layout import check_finite
from based_megatron.convert.tokenizer import data_folder
from based_megatron.data_prep.tokenizer import load_tokenizer
from based_megatron.errors import ConfigError
from based_megatron.inference.sampling import Sampling


@dataclass(frozen=True)
class Generation:
    """Continuations of a batch of prompts."""

    texts: tuple[str, ...]
    """Continuations, without the prompts."""
    new_tokens: int
    """Tokens generated, over all rows."""
    seconds: float
    """Wall time, prefill included."""
    state_bytes: int
    """State of one sequence at the end."""


def load_model(path: Path, device: str = "cpu") -> tuple[BasedForCausalLM, Path | None]:
    """The float32 model of a Hugging Face export (none of its code runs), a checkpoint, or a run's newest checkpoint.

    Returns the folder of its tokenizer too, None if that is not known. Raises CheckpointError, and ConfigError for a
    device that is not there.
    """
    place = _device(device)
    if is_export(path):
        weights, model_config = read_export(path)
        tokenizer = path if (path / "tokenizer.json").is_file() else None
    else:
        whole = read_whole(path)
        weights, model_config, tokenizer = whole.weights, whole.config.model, data_folder(whole)
    model = hf_model(weights, model_config)
    check_finite(weights, path)
    model.to(place)  # type: ignore[arg-type]
    return model, tokenizer


def text_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a prepared data folder, an export, a tokenizer.json or the GPT-2 pair. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:  # transformers reads one of these forms only
        load_tokenizer(str(path)).save(Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generate(
    model: BasedForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], sampling: Sampling
) -> Generation:
    """Continue all prompts in one left-padded batch.

    Raises ConfigError for what `check_request` refuses, and for a tokenizer that the model has no rows for.
    """
    check_request(prompts, sampling)
    if len(tokenizer) > model.config.tokenizer_vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} entries, the model {model.config.tokenizer_vocab_size}: "
            f"set --tokenizer to that of the training data"
        )
    device = model.device
    batch = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
    choice: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        choice |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        start = time.perf_counter()
        output: Any = model.generate(  # type: ignore[misc]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # Rows that round the vocabulary up are no tokens.
            suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,
            return_dict_in_generate=True,
            **choice,
        )
        new_ids = output.sequences[:, batch["input_ids"].shape[1] :].cpu()
        seconds = time.perf_counter() - start
    rows = [_until(row.tolist(), tokenizer.eos_token_id) for row in new_ids]
    return Generation(
        texts=tuple(str(tokenizer.decode(row)) for row in rows),
        new_tokens=sum(len(row) for row in rows),
        seconds=seconds,
        state_bytes=getattr(output, CACHE_NAME).state_bytes() // len(prompts),
    )


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


def check_request(prompts: list[str], sampling: Sampling) -> None:
    """Raise ConfigError for an empty prompt, one that is not text, or impossible sampling values: before a model is loaded."""
    check_limits(sampling, flag)
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty: give --prompt some text to continue")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the prompt {ascii(prompt)[:60]} is not text in UTF-8 ({error.reason}); change --prompt"
            ) from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}, which is no device of torch: set it to cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no GPU for --device {name}, torch sees {torch.cuda.device_count()}: set --device cpu"
        )
    return device
