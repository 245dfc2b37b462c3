"""Hyena (arXiv 2302.10866) of order 2: a convolution as long as the sequence between two products, whose filter a small network draws.

Its state is the whole past: there is no decoding, and Fourier transforms cannot keep packed documents apart.

Legend: B sequences, L tokens of this rank's slice, T tokens, D hidden size, C channels, U units of the filter's network.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from based_megatron.baselines.operations.convolution import long_convolution
from based_megatron.baselines.operations.short_convolution import few_taps
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.model.mixers import Mixer, MixerInputs
from based_megatron.model.mixers.facts import SavedPiece, Shape

TAPS = 3
FEATURES = 3
"""Inputs of the network at a position: its time, and a slow cosine and sine."""
INNER_LAYERS = 2
TURNS = 1e-4
"""Turns of cosine and sine over `length_tokens`: the published code has one frequency, and this is what it comes to."""
DECAYS = (math.log(0.01) / 1.5, math.log(0.01) / 0.3)
"""Slopes of the slowest and the fastest channel: filters fall to 1 % after 1.5 or 0.3 times `length_tokens`."""


@dataclass(frozen=True)
class HyenaOptions:
    """Settings of Hyena."""

    filter_units: Annotated[int, Range(at_least=1)] = 64
    """Width of the network that draws the filters, in the published code `order`."""
    length_tokens: Annotated[int, Range(at_least=2)] = 2048
    """Tokens of the time from 0 to 1, in which filters are drawn; longer sequences go on beyond 1."""


class LongFilter(nn.Module):
    """Filters of all channels: a network of sines at each position, times an exponential that fades."""

    first: nn.Parameter

    def __init__(self, width: int, options: HyenaOptions, dtype: torch.dtype) -> None:
        super().__init__()
        units, self.length_tokens = options.filter_units, options.length_tokens
        for name, shape in filter_shapes(width, options).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        self.width, self.units = width, units

    def forward(self, tokens: int) -> Tensor:
        """[D, T] in fp32 or wider."""
        wide = torch.promote_types(self.first.dtype, torch.float32)
        first, first_bias, inner, inner_bias, last, frequency = (
            getattr(self, name).to(wide) for name in ("first", "first_bias", "inner", "inner_bias", "last", "frequency")
        )
        position_T = torch.arange(tokens, device=first.device, dtype=wide)
        time_T, angle_T = position_T / (self.length_tokens - 1), position_T * (2 * math.pi * TURNS / self.length_tokens)
        features = torch.stack([time_T, angle_T.cos(), -angle_T.sin()])
        hidden_UT = torch.sin(frequency[:, None] * (first @ features + first_bias[:, None]))
        for weight, bias in zip(inner, inner_bias, strict=True):
            hidden_UT = torch.sin(frequency[:, None] * (weight @ hidden_UT + bias[:, None]))
        slopes_D = torch.linspace(*DECAYS, self.width, device=first.device, dtype=wide)
        return last @ hidden_UT * (slopes_D[:, None] * time_T).exp()


class Hyena(Mixer):
    """out_proj(x2 (h * (x1 v) + skip x1 v)), where x2, x1 and v are projections after a convolution of 3 taps, and h the long filter."""

    letter, name = "H", "hyena"
    shards = isolates = False
    Options = HyenaOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, dtype = self.config.model, self.config.params_dtype
        D = model.hidden_size
        self.in_proj = self.column((D, D, D), bias=True)
        self.conv_weight = nn.Parameter(torch.empty(3 * D, TAPS, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(3 * D, dtype=dtype))
        self.filter = LongFilter(D, self.options(model), dtype)
        self.skip = nn.Parameter(torch.empty(D, dtype=dtype))
        self.out_proj = self.row(D, bias=True)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        projected_BLC = self.in_proj(x)[0].transpose(0, 1)
        x2, x1, v = few_taps(projected_BLC, self.conv_weight, self.conv_bias).mT.chunk(3, dim=1)
        u_BDL = x1 * v
        mixed = long_convolution(u_BDL, self.filter(u_BDL.shape[-1])) + self.skip[:, None] * u_BDL
        return self.out_proj((x2 * mixed).permute(2, 0, 1).to(x.dtype).contiguous())[0], None

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        filters = {f"filter.{name}": shape for name, shape in filter_shapes(D, cls.options(model)).items()}
        return {
            "in_proj.weight": (3 * D, D),
            "in_proj.bias": (3 * D,),
            "conv_weight": (3 * D, TAPS),
            "conv_bias": (3 * D,),
            **filters,
            "skip": (D,),
            "out_proj.weight": (D, D),
            "out_proj.bias": (D,),
        }

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """The projections and what goes back, in the model's dtype; 8 channels in fp32, and 2 spectra of twice the length."""
        return piece.numbers(4 * model.hidden_size) + piece.sequences * piece.tokens * model.hidden_size * 4 * (8 + 4)

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token: 2 for each tap, and 5 N log2 N for each of three transforms of N = 2 T numbers.

        The filters, which all sequences share, are not counted.
        """
        transforms = 30.0 * math.log2(2 * sequence_length_tokens)
        return (2.0 * 3 * TAPS + transforms) * model.hidden_size

    @classmethod
    def initial(cls, name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: taps and their biases U(-1 / sqrt(K), 1 / sqrt(K)), the filter's frequencies 1, skip N(0, 1).

        The filter's network starts as projections do, N(0, init_std^2) with biases of 0: there is hardly a filter at first.
        """
        if name == "filter.frequency":
            return torch.ones(shape)
        if name == "skip":
            return torch.empty(shape).normal_(generator=generator)
        if name.startswith("conv_"):
            bound = TAPS**-0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name in ("filter.first_bias", "filter.inner_bias"):
            return torch.zeros(shape)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        """True for the projections and taps alone."""
        return name in ("in_proj.weight", "out_proj.weight", "conv_weight")


def filter_shapes(width: int, options: HyenaOptions) -> dict[str, Shape]:
    """Parameters of the network that draws the filters; its activations share their frequencies."""
    U = options.filter_units
    return {
        "first": (U, FEATURES),
        "first_bias": (U,),
        "inner": (INNER_LAYERS, U, U),
        "inner_bias": (INNER_LAYERS, U),
        "last": (width, U),
        "frequency": (U,),
    }
