"""Keys of measured rows. Their values are what JSON holds; their labels are what tables and plots show."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum


class Key(StrEnum):
    """A value with a label."""

    label: str

    def __new__(cls, value: str, label: str) -> Key:
        """Members are written `NAME = value, label`."""
        key = str.__new__(cls, value)
        key._value_ = value
        key.label = label
        return key


class Operation(Key):
    """Operation, or whole model, that a row measures."""

    COPY = "copy", "copy"
    MATRIX_PRODUCT = "matrix_product", "matrix product"
    TAYLOR_ATTENTION = "taylor_attention", "Taylor attention"
    SQUARE_ATTENTION = "square_attention", "attention by squares (ReBased)"
    SLIDING_WINDOW = "sliding_window", "sliding window"
    GATED_CONV = "gated_conv", "gated conv"
    ADD_RMS_NORM = "add_rms_norm", "add + RMSNorm"
    SWIGLU = "swiglu", "SwiGLU"
    FP8_LINEAR = "fp8_linear", "linear layer in fp8"
    CROSS_ENTROPY = "cross_entropy", "cross entropy"
    TAYLOR_STEP = "taylor_step", "decode step, Taylor state"
    WINDOW_STEP = "window_step", "decode step, window"
    CONV_STEP = "conv_step", "decode step, conv"
    TRAINING_STEP = "training_step", "training step"
    PREFILL = "prefill", "prefill"
    GENERATION = "generation", "generation"


class Passes(Key):
    """Passes that are timed together."""

    FORWARD = "forward", "forward"
    BACKWARD = "backward", "backward"
    BOTH = "forward_backward", "forward + backward"


class Method(Key):
    """The way in which a time was taken."""

    GRAPH = "graph", "replays of a CUDA graph"
    EVENTS = "events", "CUDA events around calls"
    CLOCK = "clock", "the host's clock"


class Quantity(Key):
    """Quantity of a number; the label is its unit."""

    MILLISECONDS = "milliseconds", "ms"
    TOKENS_PER_SECOND = "tokens_per_second", "tok/s"
    GIGABYTES_PER_SECOND = "gigabytes_per_second", "GB/s"
    TERAFLOPS_PER_SECOND = "teraflops_per_second", "TFLOP/s"
    TIME_PER_TOKEN_RATIO = "time_per_token_ratio", "x the time per token"
    PERCENT_OF_COPY = "percent_of_copy", "% of copy"
    FLOOR_RATIO = "floor_ratio", "x floor"
    UNBUFFERED_FLOOR_RATIO = "unbuffered_floor_ratio", "x floor without buffered keys"
    PEAK_GIB = "peak_gib", "GiB peak"
    MFU_PERCENT = "mfu_percent", "% MFU"
    STEP_MILLISECONDS = "step_milliseconds", "ms a step"
    STEP_GIGABYTES = "step_gigabytes", "GB a step"
    STATE_MEGABYTES = "state_megabytes", "MB of state a sequence"
    REQUESTS_TOKENS_PER_SECOND = "requests_tokens_per_second", "tok/s in requests"
    LLAMA_RATIO = "llama_ratio", "x Llama"


class Baseline(Key):
    """Another library or architecture that is measured in the same run."""

    SDPA_FLASH = "sdpa_flash", "SDPA flash"
    SDPA_FLASH_WHOLE_PAST = "sdpa_flash_whole_past", "SDPA flash, whole past"
    FLA_PARALLEL = "fla_parallel_based", "fla parallel_based"
    FLA_FUSED_CHUNK = "fla_fused_chunk_based", "fla fused_chunk_based"
    FLASH_ATTN = "flash_attn", "flash-attn"
    FLEX_ATTENTION = "flex_attention", "FlexAttention"
    CAUSAL_CONV1D = "causal_conv1d", "causal-conv1d"
    PYTORCH = "pytorch", "PyTorch"
    COMPILED = "torch_compile", "torch.compile"
    LIGER = "liger", "Liger"
    LIGER_BF16_RESIDUAL = "liger_bf16_residual", "Liger (bf16 residual)"
    LIGER_HALVES_SWAPPED = "liger_halves_swapped", "Liger (halves swapped)"
    LLAMA = "llama", "Llama"
    LLAMA_COMPILED = "llama_compiled_layers", "Llama, compiled layers"
    LLAMA_DYNAMIC_CACHE = "llama_dynamic_cache", "Llama, dynamic cache"
    LLAMA_STATIC_CACHE = "llama_compiled_static_cache", "Llama, compiled static cache"


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured; None where an operation has no such size."""

    batch: int | None = None
    rows: int | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    than_tokens: int | None = None
    """Length whose time per token is the divisor."""
    heads: int | None = None
    feature_dim: int | None = None
    head_dim: int | None = None
    window_left: int | None = None
    channels: int | None = None
    hidden: int | None = None
    width: int | None = None
    columns: int | None = None
    taps: int | None = None

    def __str__(self) -> str:
        """Letters and numbers, for people: `B8 T2048 H16 F16 V64`."""
        sizes = ((LETTERS[field.name], getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{letter}{size}" for letter, size in sizes if size is not None)


LETTERS = {
    "batch": "B",
    "rows": "N",
    "tokens": "T",
    "prompt_tokens": "prompt ",
    "new_tokens": "new ",
    "than_tokens": "than T",
    "heads": "H",
    "feature_dim": "F",
    "head_dim": "V",
    "window_left": "W",
    "channels": "D",
    "hidden": "D",
    "width": "W",
    "columns": "C",
    "taps": "K",
}
