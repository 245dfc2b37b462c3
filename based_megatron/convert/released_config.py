"""config.json of the released checkpoints and our ModelConfig. Import paths in it are compared with known ones only."""

from typing import Any

from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.config.schema import ModelConfig
from based_megatron.convert.layout import short_pattern
from based_megatron.errors import CheckpointError

CONV = "based.models.mixers.convolution.BaseConv"
LINEAR = "based.models.mixers.linear_attention.LinearAttention"
FEATURES = "based.models.mixers.linear_attention.TaylorExp"
WINDOW = "based.models.mixers.slide_attention.SlidingAttention"

DEFAULT_CONV_KERNEL = 3
"""The released key is a misspelt `kernel_sizes`, which the released code ignores."""
MLP_MULTIPLES = (256, 128, 1)
"""The released code rounds n_inner up to 256; a later loader also tries 128."""

REQUIRED = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "residual_in_fp32": True,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def read_released_config(values: dict[str, Any], mlp_rows: int) -> ModelConfig:
    """Our config for a released config.json, whose MLP has fc1 weights of `mlp_rows` rows.

    Raises CheckpointError for a key that is missing, a value that we cannot run, or an unknown `_target_`.
    """
    try:
        return _read(values, mlp_rows)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"config.json is not that of a released Based checkpoint: {error!r}") from error


def released_config(config: ModelConfig) -> dict[str, Any]:
    """config.json for a model. Raises CheckpointError if the released code has no such model."""
    letters = parse_layer_pattern(config.layer_pattern)
    if "A" in letters:
        raise CheckpointError(
            f"the released layout has no full attention, but model.layer_pattern is {config.layer_pattern!r}; "
            f"use --format hf"
        )
    if config.ffn_hidden_size % MLP_MULTIPLES[0]:
        raise CheckpointError(
            f"the released code rounds the MLP up to a multiple of {MLP_MULTIPLES[0]}, but model.ffn_hidden_size is "
            f"{config.ffn_hidden_size}; use --format hf"
        )
    heads = config.num_heads
    return REQUIRED | {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "n_embd": config.hidden_size,
        "n_layer": len(letters),
        "n_head": heads,
        "n_inner": config.ffn_hidden_size,
        "n_positions": 0,
        "max_position_embeddings": 0,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "rotary_emb_fraction": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tie_embeddings,
        "use_flash_attn": True,
        "fused_bias_fc": False,
        "fused_mlp": False,
        "fused_dropout_add_ln": True,
        "special_initializer": True,
        "alt_mixer_layers": [i for i, letter in enumerate(letters) if letter == "L"],
        "alt_mixer_2_layers": [i for i, letter in enumerate(letters) if letter == "S"],
        "mixer": {
            "_target_": CONV,
            "l_max": 2048,
            "use_bias": True,
            "expand_proj": config.conv_expand,
            "kernel_size": config.conv_kernel,
        },
        "alt_mixer": {
            "_target_": LINEAR,
            "l_max": 2048,
            "feature_dim": config.feature_dim,
            "num_heads": heads,
            "feature_map": {"_target_": FEATURES, "input_dim": config.feature_dim},
        },
        "alt_mixer_2": {
            "_target_": WINDOW,
            "window_size": 2 * config.window_left,
            "num_heads": heads,
            "causal": True,
        },
    }


def _read(values: dict[str, Any], mlp_rows: int) -> ModelConfig:
    for key, wanted in REQUIRED.items():
        if values.get(key, wanted) != wanted:
            raise CheckpointError(f"config.json has {key} {values[key]!r}, but only {wanted!r} is known")
    linear_layers, window_layers = (
        set(values.get("alt_mixer_layers") or ()),
        set(values.get("alt_mixer_2_layers") or ()),
    )
    layers = range(values["n_layer"])
    if linear_layers & window_layers or not (linear_layers | window_layers) <= set(layers):
        raise CheckpointError(
            f"config.json has alt_mixer_layers {sorted(linear_layers)} and alt_mixer_2_layers {sorted(window_layers)} "
            f"in {len(layers)} layers: they overlap or are out of range"
        )
    settings: dict[str, Any] = {}
    if len(linear_layers | window_layers) < len(layers):
        conv = _mixer(values, "mixer", CONV)
        if not conv.get("use_bias", True):
            raise CheckpointError("config.json has mixer.use_bias false, but only true is known")
        settings["conv_kernel"] = conv.get("kernel_size", DEFAULT_CONV_KERNEL)
        settings["conv_expand"] = conv["expand_proj"]
    if linear_layers:
        linear = _mixer(values, "alt_mixer", LINEAR)
        _check_target("alt_mixer.feature_map", linear["feature_map"], FEATURES)
        settings["feature_dim"] = linear["feature_dim"]
        _check_heads(values, "alt_mixer", linear)
    if window_layers:
        window = _mixer(values, "alt_mixer_2", WINDOW)
        settings["window_left"] = window["window_size"] // 2
        _check_heads(values, "alt_mixer_2", window)
    return ModelConfig(
        layer_pattern=short_pattern(
            "".join("L" if i in linear_layers else "S" if i in window_layers else "c" for i in layers)
        ),
        hidden_size=values["n_embd"],
        ffn_hidden_size=_mlp_width(values, mlp_rows),
        num_heads=values["n_head"],
        rotary_base=float(values.get("rotary_emb_base", 10000.0)),
        rotary_fraction=float(values["rotary_emb_fraction"]),
        norm_eps=values["layer_norm_epsilon"],
        vocab_size=values["vocab_size"],
        vocab_multiple=values["pad_vocab_size_multiple"],
        tie_embeddings=values.get("tie_word_embeddings", True),
        init_std=values["initializer_range"],
        **settings,
    )


def _mixer(values: dict[str, Any], key: str, target: str) -> dict[str, Any]:
    _check_target(key, values[key], target)
    return values[key]


def _check_target(key: str, section: dict[str, Any], target: str) -> None:
    if section["_target_"] != target:
        raise CheckpointError(
            f"config.json has {key}._target_ {section['_target_']!r}, but only {target} is known here"
        )


def _check_heads(values: dict[str, Any], key: str, section: dict[str, Any]) -> None:
    for name in ("num_heads", "num_heads_kv"):
        if section.get(name) not in (None, values["n_head"]):
            raise CheckpointError(f"config.json has {key}.{name} {section[name]}, but n_head {values['n_head']}")


def _mlp_width(values: dict[str, Any], mlp_rows: int) -> int:
    inner = values["n_inner"]
    widths = [-(-inner // multiple) * multiple for multiple in MLP_MULTIPLES]
    if mlp_rows not in [2 * width for width in widths]:
        raise CheckpointError(
            f"config.json has n_inner {inner}, which makes fc1 weights of {2 * widths[0]} rows; "
            f"those of the first layer have {mlp_rows}"
        )
    return mlp_rows // 2
