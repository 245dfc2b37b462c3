"""The systems of the study: the points of each, the bytes of their states, and the accuracies that others have published.

A system is a layer pattern and sizes: its mixers are those of the product and of `baselines`, and BaseConv in front of those that have no
convolution of their own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from based_megatron.config import ModelConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.kernels.decode import ConvState, WindowState
from based_megatron.model.mixers import MIXERS, Mixer, layer_mixers, mixers_of
from based_megatron.recall.model import Block

BASE_CONV = "based_megatron.recall.base_conv"
BASELINES = "based_megatron.baselines"
FP32_BYTES = 4
OUTSIDE_WIDTHS = {"figure": (64, 128), "tiny": (32,)}
PRODUCT_SIZES = {"figure": ((64, 16, 64), (128, 16, 64)), "tiny": ((32, 8, 8),)}
"""Width, feature dim and window of the product's own model."""


@dataclass(frozen=True)
class Point:
    """A model of the study."""

    system: str
    name: str
    model: ModelConfig
    block: Block = "plain"
    product: bool = False
    """The whole model of the product, with positions and MLPs, instead of the study's."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a model keeps of one sequence between two tokens, with fp32 numbers, over all layers."""

    recurrent: int
    """As the paper's Figure 2 counts: without the inputs of short convolutions."""
    published: int
    """As Zoology's figure of 2026 counts, and as plots here do: with three inputs a channel of the convolution in front."""
    product: int | None
    """All tensors that this product decodes with; None where it keeps no state of constant size."""


@dataclass(frozen=True)
class System:
    """One kind of sequence mixer, with the points of each preset in the order of interest."""

    name: str
    title: str
    color: str
    figure: tuple[Callable[[int], Point], ...]
    tiny: tuple[Callable[[int], Point], ...] = ()
    """Empty where plain PyTorch takes too long on a CPU."""


def state_bytes(model: ModelConfig, longest_tokens: int) -> StateBytes:
    """Bytes of the states of all layers, measured on the tensors that decoding would allocate.

    longest_tokens: length at which a state that grows is counted.
    """
    parts = [_layer_bytes(mixer, model, longest_tokens) for mixer in layer_mixers(model)]
    recurrent, convolution, product = zip(*parts, strict=True)
    known = [n for n in product if n is not None]
    return StateBytes(
        sum(recurrent), sum(recurrent) + sum(convolution), sum(known) if len(known) == len(product) else None
    )


def _layer_bytes(mixer: type[Mixer], model: ModelConfig, longest_tokens: int) -> tuple[int, int, int | None]:
    """(recurrent, of a convolution in front, all that the product keeps)."""
    if mixer.name in GROWING:
        return GROWING[mixer.name] * model.hidden_size * longest_tokens * FP32_BYTES, 0, None
    state: Any = mixer.empty_state(model, 1, torch.float32, torch.device("meta"))
    product = sum(tensor.nbytes for tensor in vars(state).values())
    if isinstance(state, ConvState):
        rows = state.inputs_BhD.shape[1]
        return 0, product * (rows + 1) // rows if rows else 0, product
    if isinstance(state, WindowState):  # a slot more than keys before the query: that of its own
        W = state.window_left
        return product * W // (W + 1), 0, product
    if mixer.name == "h3":  # every key of a head has a state for every value, of which published sizes count one
        moments = state.moments_BHJVM2
        return moments.nbytes // moments.shape[2], 0, product
    return sum(getattr(state, name).nbytes for name in RECURRENT.get(mixer.name, tuple(vars(state)))), 0, product


GROWING = {"full_attention": 2, "hyena": 1}
"""Numbers a token and channel of mixers whose state grows with the sequence."""
RECURRENT = {
    "linear_attention": ("moments_BHRV", "normaliser_BHR"),
    "mamba": ("state",),
    "mamba2": ("state",),
    "deltanet": ("state_BHKV",),
    "gated_deltanet": ("state_BHKV",),
    "rwkv7": ("state_BHKV",),
    "rwkv4": ("sums_BDX", "exponent_BD"),
}
"""Tensors that published sizes count, of mixers that keep more; of other mixers all of them count."""


def _model(pattern: str, width: int, vocab_size: int, **sizes: Any) -> ModelConfig:
    defaults = dict(
        num_heads=1, ffn_hidden_size=width, vocab_multiple=1, init_std=0.02, mixers=",".join(_modules(pattern))
    )
    return ModelConfig(layer_pattern=pattern, hidden_size=width, vocab_size=vocab_size, **{**defaults, **sizes})


def _modules(pattern: str) -> Iterator[str]:
    letters = set(parse_layer_pattern(pattern))
    if "b" in letters:
        yield BASE_CONV
    if letters - {"b", *MIXERS}:
        yield BASELINES


def _attention(width: int) -> Callable[[int], Point]:
    return lambda vocab: Point("attention", f"attention-d{width}", _model("bA", width, vocab))


def _based(width: int, features: int) -> Callable[[int], Point]:
    return lambda vocab: Point("based", f"based-d{width}-f{features}", _model("bL", width, vocab, feature_dim=features))


def _variant(system: str, width: int, features: int, **settings: Any) -> Callable[[int], Point]:
    """A variant of Based. At equal bytes of state ReBased has a feature dim larger by 1: (F + 1) (F + 2) / 2 rows in both."""
    return lambda vocab: Point(
        system, f"{system}-d{width}-f{features}", _model("bL", width, vocab, feature_dim=features, **settings)
    )


def _window(width: int, previous: int) -> Callable[[int], Point]:
    return lambda vocab: Point(
        "window", f"window-d{width}-w{previous}", _model("bS", width, vocab, window_left=previous)
    )


def _heads(
    system: str, letters: str, width: int, *options: str, heads: int = 2, block: Block = "plain"
) -> Callable[[int], Point]:
    """A system whose size is its width."""
    return lambda vocab: Point(
        system, f"{system}-d{width}", _model(letters, width, vocab, num_heads=heads, mixer_options=options), block
    )


def _ranks(low: int, gate: int) -> tuple[str, ...]:
    return f"rwkv7.decay_rank={low}", f"rwkv7.rate_rank={low}", f"rwkv7.gate_rank={gate}"


def _state_space(system: str, letters: str, width: int, states: int, *options: str) -> Callable[[int], Point]:
    """A system of two equal layers with convolutions of their own, and so many states a channel."""
    words = (f"{system}.state_dim={states}", *options)
    return lambda vocab: Point(
        system, f"{system}-d{width}-n{states}", _model(letters, width, vocab, mixer_options=words), "mamba"
    )


GATED_DELTANET = ("gated_deltanet.expand_k=1", "gated_deltanet.expand_v=2", "gated_deltanet.gate=false")
SYSTEMS = {
    system.name: system
    for system in (
        System(
            "based", "Based", "#d62728",
            (_based(64, 16), _based(128, 16), _based(48, 8), _based(64, 8), _based(128, 8), _based(256, 16)),
            (_based(32, 8), _based(32, 2), _based(32, 4)),
        ),
        System(
            "rebased", "ReBased", "#ff9896",
            tuple(_variant("rebased", *sizes, feature_map="rebased") for sizes in ((64, 17), (128, 17), (64, 9))),
            tuple(_variant("rebased", *sizes, feature_map="rebased") for sizes in ((32, 9), (32, 3), (32, 5))),
        ),
        System(
            "jrt", "Based with a prefix (JRT)", "#c49c94",
            tuple(_variant("jrt", *sizes, prefix_tokens=1024) for sizes in ((64, 16), (128, 16), (64, 8))),
            tuple(_variant("jrt", *sizes, prefix_tokens=32) for sizes in ((32, 8), (32, 2), (32, 4))),
        ),
        System("attention", "attention", "#000000", (_attention(64), _attention(128)), (_attention(32),)),
        System(
            "window", "sliding window", "#7f7f7f",
            (_window(128, 64), _window(128, 16), _window(128, 256), _window(128, 8)),
            (_window(32, 4), _window(32, 8), _window(32, 16)),
        ),
        System(
            "mamba2", "Mamba-2", "#1f77b4",
            tuple(_state_space("mamba2", "NN", *sizes) for sizes in ((128, 16), (64, 16), (128, 24), (64, 8), (256, 24))),
            tuple(_state_space("mamba2", "NN", *sizes) for sizes in ((32, 8), (32, 4))),
        ),
        System(
            "gated_deltanet", "Gated DeltaNet", "#9467bd",
            tuple(_heads("gated_deltanet", "bE", width, *GATED_DELTANET) for width in (128, 64)),
            tuple(_heads("gated_deltanet", "bE", width, *GATED_DELTANET) for width in (32,)),
        ),
        System(
            "deltanet", "DeltaNet", "#ff7f0e",
            tuple(_heads("deltanet", "bD", width) for width in (64, 128, 256)),
            tuple(_heads("deltanet", "bD", width) for width in (32, 16)),
        ),
        System(
            "gla", "GLA", "#2ca02c",
            tuple(_heads("gla", "bG", width) for width in (128, 64, 256)),
            tuple(_heads("gla", "bG", width) for width in (32, 16)),
        ),
        System(
            "retnet", "RetNet", "#8c564b",
            tuple(_heads("retnet", "bR", width, "retnet.expand_v=1") for width in (128, 64, 256)),
            tuple(_heads("retnet", "bR", width, "retnet.expand_v=1") for width in (32, 16)),
        ),
        System(
            "rwkv7", "RWKV-7", "#e377c2",
            tuple(_heads("rwkv7", "bW", width, *_ranks(16, 64), heads=width // 64) for width in (128, 64, 256)),
            tuple(_heads("rwkv7", "bW", width, *_ranks(8, 16), heads=1) for width in (32,)),
        ),
        System(
            "hyena", "Hyena", "#bcbd22",
            tuple(_heads("hyena", "HH", width, "hyena.length_tokens=1024", heads=1, block="residual norm") for width in (64, 128)),
            tuple(_heads("hyena", "HH", width, "hyena.length_tokens=32", heads=1, block="residual norm") for width in (32,)),
        ),
        System(
            "h3", "H3", "#aec7e8",
            tuple(_heads("h3", "KK", width, f"h3.state_dim={width // 4}", heads=1, block="residual norm") for width in (128, 64)),
            tuple(_heads("h3", "KK", width, f"h3.state_dim={width // 4}", heads=1, block="residual norm") for width in (32,)),
        ),
        System(
            "rwkv4", "RWKV-4", "#f7b6d2",
            tuple(_heads("rwkv4", "bV", width, heads=1) for width in (128, 256)),
            tuple(_heads("rwkv4", "bV", width, heads=1) for width in (32,)),
        ),
        System(
            "mamba", "Mamba", "#17becf",
            tuple(_state_space("mamba", "MM", *sizes) for sizes in ((64, 16), (128, 16), (128, 24))),
        ),
    )
}  # fmt: skip


def outside_points(modules: str, options: tuple[str, ...], preset: str, vocab_size: int) -> dict[str, list[Point]]:
    """Points of the mixers of other modules, by the mixers' names: BaseConv and the mixer, in two widths.

    Raises ConfigError for a module or a mixer that cannot be used.
    """
    everything = mixers_of(ModelConfig(mixers=modules))
    return {
        mixer.name: [
            Point(
                mixer.name,
                f"{mixer.name}-d{width}",
                _model(f"b{letter}", width, vocab_size, mixers=f"{BASE_CONV},{modules}", mixer_options=options),
            )
            for width in OUTSIDE_WIDTHS[preset]
        ]
        for letter, mixer in everything.items()
        if letter not in MIXERS
    }


def pattern_points(pattern: str, modules: str, options: tuple[str, ...], preset: str, vocab_size: int) -> list[Point]:
    """Points of the product's own model with a layer pattern, in the sizes of a preset. Raises ConfigError for an unknown letter."""
    found = [
        Point(
            pattern,
            f"{pattern}-d{width}-f{features}",
            _model(
                pattern,
                width,
                vocab_size,
                mixers=modules,
                mixer_options=options,
                feature_dim=features,
                window_left=window,
                ffn_hidden_size=2 * width,
            ),
            product=True,
        )
        for width, features, window in PRODUCT_SIZES[preset]
    ]
    for point in found:
        layer_mixers(point.model)
    return found


def in_order_of_interest(points: list[list[Point]]) -> list[Point]:
    """The first point of every system, then the second of each, and so on: a sweep that is cut short still compares."""
    longest = max(map(len, points), default=0)
    return [some[place] for place in range(longest) for some in points if place < len(some)]
