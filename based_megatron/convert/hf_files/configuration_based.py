"""Configuration of Based models."""

from dataclasses import field

from transformers import PreTrainedConfig

LAYER_TYPES = ("conv", "linear_attention", "sliding_attention", "full_attention")


class BasedConfig(PreTrainedConfig):
    """Architecture of a Based model. `layer_types` names the mixer of each layer and drives the cache."""

    model_type = "based"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50264
    """Rows of the embedding; all of them take part in the softmax."""
    tokenizer_vocab_size: int = 0
    """Entries of the tokenizer; rows from here on are padding that generation never emits. 0 means vocab_size."""
    vocab_multiple: int = 8
    """vocab_size is tokenizer_vocab_size rounded up to a multiple of this."""
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    layer_types: list[str] = field(default_factory=list)
    """Mixer of each layer: conv, linear_attention, sliding_attention or full_attention. Empty means as in the 360M."""
    feature_dim: int = 16
    """Query and key dim of a linear attention head, before the Taylor feature map."""
    sliding_window: int = 129
    """Keys that a window query sees, itself included."""
    conv_kernel: int = 3
    conv_expand: int = 4
    """Width of the conv mixer's input projection, in hidden sizes: half is convolved, half is the gate."""
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    """Part of each head that is rotated, in sliding and full attention."""
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if not self.layer_types:
            repeats = self.num_hidden_layers // 5 + 1
            pattern = ("conv", "linear_attention", "sliding_attention", "conv", "conv")
            self.layer_types = list(pattern * repeats)[: self.num_hidden_layers]
        self.tokenizer_vocab_size = self.tokenizer_vocab_size or self.vocab_size
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name {self.num_hidden_layers} mixers out of {', '.join(LAYER_TYPES)}; "
                f"got {len(self.layer_types)}{', with unknown ' + ', '.join(unknown) if unknown else ''}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


__all__ = ["BasedConfig"]
