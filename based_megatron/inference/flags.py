"""Flags that `based generate` and `based serve` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from based_megatron.config.limits import Range

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class DecodingFlags:
    """How a model is decoded, and on what."""

    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: that of the export, or of the data folder of the run."""
    device: str = ""
    """Device to run on, cpu or cuda. Default: a GPU if there is one."""
    precision: Precision = "auto"
    """Type of weights and activations. Default: bf16 on a GPU, fp32 on a CPU."""
    slots: Annotated[int, Range(at_least=0, at_most=65_536)] = 0
    """Texts that are decoded at once; others wait for a free slot. Default: 128 on a GPU and 8 on a CPU; `based generate` takes no more
    than it has prompts."""
    threads: Annotated[int, Range(at_least=0, at_most=1024)] = 0
    """Threads on a CPU. Default: one for a model of fewer than 20 million parameters, else those that torch takes."""
    reproducible: bool = False
    """Read prompts one by one: a text is then the same bit for bit whatever else is asked, with the same --slots."""
    prefix: Path | None = None
    """File of `based generate --save-prefix` with the states of a start that prompts share: those that begin with it are not read again
    from there."""
    mixers: str = ""
    """Modules of mixers that an export has and that are not ours, as in model.mixers."""
