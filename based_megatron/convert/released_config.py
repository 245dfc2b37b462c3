"""config.json of the released checkpoints and our ModelConfig. Import paths in it are compared with known ones only."""

from typing import Any

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.layout import check_read, short_pattern
from based_megatron.errors import CheckpointError
from based_megatron.model.mixers import MIXERS, layer_mixers

SLOTS = {mixer.released_slot: mixer for mixer in MIXERS.values() if mixer.released_slot}
"""Mixers of the released code by their section of config.json: `mixer` is that of all layers that no other section lists."""
REST = "mixer"
MLP_MULTIPLES = (256, 128, 1)
"""The released code rounds n_inner up to 256; a later loader also tries 128."""

MOST_LAYERS = 10_000
"""More than any model has: a damaged number must not become as long a list."""

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
        return check_read(_read(values, mlp_rows))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"config.json is not that of a released Based checkpoint: {error!r}") from error


def released_config(config: ModelConfig) -> dict[str, Any]:
    """config.json for a model. Raises CheckpointError if the released code has no such model."""
    mixers = layer_mixers(config)
    for mixer in mixers:
        if mixer.released_slot is None:
            raise CheckpointError(
                f"the released layout has no {mixer.name.replace('_', ' ')}, but model.layer_pattern is {config.layer_pattern!r}; "
                f"use --format hf"
            )
    if config.ffn_hidden_size % MLP_MULTIPLES[0]:
        raise CheckpointError(
            f"the released code rounds the MLP up to a multiple of {MLP_MULTIPLES[0]}, but model.ffn_hidden_size is "
            f"{config.ffn_hidden_size}; use --format hf"
        )
    return REQUIRED | {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "n_embd": config.hidden_size,
        "n_layer": len(mixers),
        "n_head": config.num_heads,
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
        **{
            f"{slot}_layers": [i for i, mixer in enumerate(mixers) if mixer.released_slot == slot]
            for slot in SLOTS
            if slot != REST
        },
        **{
            slot: {"_target_": mixer.released_target} | mixer.released_settings(config) for slot, mixer in SLOTS.items()
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
    if not 1 <= values["n_layer"] <= MOST_LAYERS:
        raise CheckpointError(f"config.json has n_layer {values['n_layer']!r}: it must be 1 to {MOST_LAYERS}")
    layers = range(values["n_layer"])
    if linear_layers & window_layers or not (linear_layers | window_layers) <= set(layers):
        raise CheckpointError(
            f"config.json has alt_mixer_layers {sorted(linear_layers)} and alt_mixer_2_layers {sorted(window_layers)} "
            f"in {len(layers)} layers: they overlap or are out of range"
        )
    slots = ["alt_mixer" if i in linear_layers else "alt_mixer_2" if i in window_layers else REST for i in layers]
    settings: dict[str, Any] = {}
    for slot in dict.fromkeys(slots):
        section = values[slot]
        _check_target(slot, section, SLOTS[slot].released_target)
        _check_heads(values, slot, section)
        settings |= SLOTS[slot].read_released(section)
    return ModelConfig(
        layer_pattern=short_pattern("".join(SLOTS[slot].letter for slot in slots)),
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
