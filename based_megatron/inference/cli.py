"""The command `based generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from based_megatron.errors import ConfigError
from based_megatron.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with an export or a checkpoint."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face export, a checkpoint, or a run folder: its newest valid checkpoint."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Text to continue; repeat the flag for a batch of prompts."""
    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: that of the export, or of the data folder of the run."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    device: str = ""
    """Device to run on, such as cpu or cuda. Default: a GPU if there is one."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line, generate and print. Raises BasedError for what a user can fix."""
    config = tyro.cli(GenerateConfig, args=list(argv), prog="based generate")
    # They take seconds to load, which neither --help nor a typo should wait for.
    import torch

    from based_megatron.inference.generate import check_request, generate, load_model, text_tokenizer

    check_request(list(config.prompt), config.sampling)
    model, folder = load_model(config.model, config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = config.tokenizer or folder
    if folder is None:
        raise ConfigError(
            f"no tokenizer is known for {config.model}: set --tokenizer to the data folder of its training"
        )
    result = generate(model, text_tokenizer(folder), list(config.prompt), config.sampling)
    for prompt, text in zip(config.prompt, result.texts, strict=True):
        print(f"{prompt}{text}\n")
    print(
        f"{result.new_tokens} tokens in {result.seconds:.2f} s ({result.new_tokens / result.seconds:.1f} tokens/s), "
        f"state {result.state_bytes:,} bytes a sequence"
    )
