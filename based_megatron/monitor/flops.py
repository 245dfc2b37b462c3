"""Parameters, and the floating point operations of training, from a ModelConfig alone.

Counted are the operations that the model needs, whatever kernel runs them: a multiply-add is 2, backward is twice
forward, recomputed activations are not counted again, and elementwise work (norms, gates, rotary, softmax) is left out.
Per token:

- every weight of a linear layer, the output projection included, costs 2 forward: 6N in training;
- what a mixer does besides, each says in its `mixing_flops`.
"""

import re
from math import prod

from based_megatron.config import ModelConfig
from based_megatron.model.mixers import layer_mixers, mixers_of

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
    layers = layer_mixers(model)
    d = model.hidden_size
    parts = {"embedding": model.embedding_rows * d}
    for mixer in mixers_of(model).values():
        if mixer in layers:
            parts[mixer.name] = layers.count(mixer) * sum(map(prod, mixer.parameter_shapes(model).values()))
    parts["mlp"] = len(layers) * 3 * d * model.ffn_hidden_size
    parts["norms"] = (2 * len(layers) + 1) * d
    if not model.tie_embeddings:
        parts["output"] = model.embedding_rows * d
    return parts


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    return sum(parameter_breakdown(model).values())


def training_flops_per_token(model: ModelConfig, sequence_length_tokens: int) -> float:
    """Operations of one token, forward and backward, by the convention at the top of this file."""
    layers, parts = layer_mixers(model), parameter_breakdown(model)
    # Tied or not, the output projection multiplies one vocabulary matrix, and the input looks rows up for nothing.
    weights = parts["embedding"] + parts["mlp"] + sum(mixer.linear_weights(model) for mixer in layers)
    mixing = sum(mixer.mixing_flops(model, sequence_length_tokens) for mixer in layers)
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
