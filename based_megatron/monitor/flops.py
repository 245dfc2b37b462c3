"""Parameters, and the floating point operations of training, from a ModelConfig alone.

Counted are the operations that the model needs, whatever kernel runs them: a multiply-add is 2, backward is twice
forward, recomputed activations are not counted again, and elementwise work (norms, gates, rotary, softmax) is left out.
Per token:

- every weight of a linear layer, the output projection included, costs 2 forward: 6N in training;
- a gated conv, 2 for each tap and channel;
- Taylor linear attention, in its recurrent form with the unpacked features of Based (1 + F + F^2 a head): adding
  phi(k) v to the state and reading phi(q) from it cost 2 each for every state element, the normaliser being one more
  column (a kernel that packs the symmetric features, or works in chunks, does less or more than this);
- attention, 4 for each channel and visible key; the number of keys is averaged over the positions of a sequence, window
  and causal mask applied, as if a sequence were one document.
"""

import re

from based_megatron.config import ModelConfig
from based_megatron.config.pattern import MIXERS, parse_layer_pattern

_PEAK_BF16_TERAFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.0,
}
_PEAK_BF16_TERAFLOPS_OF_BOARD = {("H100", "PCIE"): 756.0, ("H100", "NVL"): 835.0}


def parameter_breakdown(model: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding, each kind of mixer, mlp, norms, and output if not tied.

    The embedding has its rounded rows; padding that tensor parallelism adds is not counted.
    """
    layers = parse_layer_pattern(model.layer_pattern)
    d = model.hidden_size
    vocabulary_rows = -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
    parts = {"embedding": vocabulary_rows * d}
    for letter, mixer in MIXERS.items():
        if letter in layers:
            bare = _mixer_weights(model, mixer) + _mixer_other_parameters(model, mixer)
            parts[mixer] = layers.count(letter) * bare
    parts["mlp"] = len(layers) * 3 * d * model.ffn_hidden_size
    parts["norms"] = (2 * len(layers) + 1) * d
    if not model.tie_embeddings:
        parts["output"] = vocabulary_rows * d
    return parts


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    return sum(parameter_breakdown(model).values())


def training_flops_per_token(model: ModelConfig, sequence_length_tokens: int) -> float:
    """Operations of one token, forward and backward, by the convention at the top of this file."""
    layers = parse_layer_pattern(model.layer_pattern)
    parts = parameter_breakdown(model)
    # Tied or not, the output projection multiplies one vocabulary matrix, and the input looks rows up for nothing.
    weights = parts["embedding"] + parts["mlp"]
    weights += sum(_mixer_weights(model, MIXERS[letter]) for letter in layers)
    mixing = sum(_mixing_flops(model, MIXERS[letter], sequence_length_tokens) for letter in layers)
    return 6.0 * weights + 3.0 * mixing


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by torch.cuda.get_device_name, as its maker gives them; None if not known here."""
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    if "MIG" in words:
        return None
    for board, peak in _PEAK_BF16_TERAFLOPS_OF_BOARD.items():
        if all(word in words for word in board):
            return peak * 1e12
    return next((peak * 1e12 for chip, peak in _PEAK_BF16_TERAFLOPS.items() if chip in words), None)


def _mixer_weights(model: ModelConfig, mixer: str) -> int:
    """Weights of a mixer's linear layers."""
    d = model.hidden_size
    if mixer == "gated_conv":
        return model.conv_expand * d * d + model.conv_expand * d // 2 * d
    if mixer == "linear_attention":
        return 2 * model.num_heads * model.feature_dim * d + 2 * d * d
    return 4 * d * d


def _mixer_other_parameters(model: ModelConfig, mixer: str) -> int:
    """Convolution taps and biases."""
    if mixer != "gated_conv":
        return 0
    d = model.hidden_size
    return model.conv_kernel * model.conv_expand * d // 2 + model.conv_expand * d + d


def _mixing_flops(model: ModelConfig, mixer: str, sequence_length_tokens: int) -> float:
    """Forward operations of a token beside the linear layers."""
    d = model.hidden_size
    if mixer == "gated_conv":
        return 2.0 * model.conv_kernel * model.conv_expand * d / 2
    if mixer == "linear_attention":
        features = 1 + model.feature_dim + model.feature_dim**2
        return 4.0 * features * (d + model.num_heads)
    previous = model.window_left if mixer == "sliding_window" else sequence_length_tokens
    return 4.0 * d * _mean_visible_keys(sequence_length_tokens, previous)


def _mean_visible_keys(sequence_length_tokens: int, previous: int) -> float:
    """Mean over positions t = 1..T of min(t, previous + 1)."""
    full = min(previous + 1, sequence_length_tokens)
    return full - full * (full - 1) / (2 * sequence_length_tokens)
