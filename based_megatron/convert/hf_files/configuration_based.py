"""Configuration of Based models."""

from dataclasses import field

from transformers import PreTrainedConfig

CACHE_LAYERS = {
    "conv": "linear_attention",
    "linear_attention": "linear_attention",
    "sliding_attention": "sliding_attention",
    "full_attention": "full_attention",
}
"""Mixers, and the kind of layer that each has in the caches of transformers."""


COUNTS = (
    "vocab_size",
    "vocab_multiple",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "feature_dim",
    "conv_kernel",
    "conv_expand",
)
"""Sizes that must be whole numbers above 0."""
MOST_LAYERS = 10_000
"""More than any model has: a damaged number must not become as long a list."""


class BasedConfig(PreTrainedConfig):
    """Architecture of a Based model. `mixers` names the mixer of each layer; `layer_types` only drives the cache.

    `layer_types` belongs to transformers, which checks it and, in some versions, renames its entries: 5.17 makes
    linear_attention of conv. So nothing is built from it, and it is set anew from `mixers` whenever a config is made.
    """

    model_type = "based"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  Trainer adds a list to it

    vocab_size: int = 50264
    """Rows of the embedding; all of them take part in the softmax."""
    tokenizer_vocab_size: int = 0
    """Entries of the tokenizer; rows from here on are free for new ones. 0 means vocab_size."""
    vocab_multiple: int = 8
    """vocab_size is tokenizer_vocab_size rounded up to a multiple of this."""
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    mixers: list[str] = field(default_factory=list)
    """Mixer of each layer: conv, linear_attention, sliding_attention or full_attention. Empty means as in the 360M."""
    extra_mixers: dict[str, str] = field(default_factory=dict)
    """More mixers, which bring files of their own, and the kind of layer that each has in the cache."""
    mixer_options: list[str] = field(default_factory=list)
    """Settings that only one kind of mixer has: words NAME.KEY=VALUE, by the name that the training code gives the mixer."""
    layer_types: list[str] = field(default_factory=list)
    """Layers of the cache, which follow from `mixers`. Read only where `mixers` is empty: older exports named mixers here."""
    feature_dim: int = 16
    """Query and key dim of a linear attention head, before the feature map."""
    feature_map: str = "taylor"
    """Weights of linear attention: taylor 1 + s + s^2 / 2, or rebased, s^2 of normed queries and keys."""
    prefix_tokens: int = 0
    """First tokens of a sequence that all its tokens see in linear attention (arXiv 2407.05483). With a cache, those of the first call."""
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
    max_position_embeddings: int | None = None
    """Tokens of a training sequence, if they are known. Nothing is embedded by position: longer ones run, but were not trained."""
    trained_steps: int = 0
    """Optimizer steps of pretraining that the weights have seen; 0 if they were not trained by based_megatron."""
    trained_tokens: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for name in COUNTS:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, not {self.num_hidden_layers}")
        self.mixers = self.mixers or self.layer_types
        if not self.mixers:
            repeats = self.num_hidden_layers // 5 + 1
            pattern = ("conv", "linear_attention", "sliding_attention", "conv", "conv")
            self.mixers = list(pattern * repeats)[: self.num_hidden_layers]
        self.tokenizer_vocab_size = self.tokenizer_vocab_size or self.vocab_size
        cache_layers = CACHE_LAYERS | self.extra_mixers
        unknown = sorted(set(self.mixers) - set(cache_layers))
        if unknown or len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers must name {self.num_hidden_layers} mixers out of {', '.join(cache_layers)}; "
                f"got {len(self.mixers)}{', with unknown ' + ', '.join(unknown) if unknown else ''}"
            )
        self.layer_types = [cache_layers[mixer] for mixer in self.mixers]
        if self.feature_map not in ("taylor", "rebased"):
            raise ValueError(f"feature_map must be taylor or rebased, not {self.feature_map!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


__all__ = ["BasedConfig"]
