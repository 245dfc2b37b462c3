"""Small models of every baseline, for the tests that all of them pass."""

import dataclasses
from typing import Any

from based_megatron.config import Config, ModelConfig, ParallelConfig
from based_megatron.model.mixers import mixers_of
from support.layouts import small_config

SYSTEMS: dict[str, dict[str, Any]] = {
    # A document of one token has a normed head of s v, which is steep where s is near 0: rounding grows with 1 / norm_eps.
    "deltanet": {"layer_pattern": "DcD", "norm_eps": 0.1},
    "gated_deltanet": {"layer_pattern": "EcE", "norm_eps": 0.1},
    "retnet": {"layer_pattern": "RcR", "norm_eps": 0.1},
    "gla": {"layer_pattern": "GcG", "norm_eps": 0.1},
    "mamba2": {"layer_pattern": "NcN", "mixer_options": ("mamba2.head_dim=8", "mamba2.state_dim=5")},
    "mamba": {"layer_pattern": "McM", "mixer_options": ("mamba.state_dim=5",)},
    "rwkv4": {"layer_pattern": "VcV"},
    "rwkv7": {
        "layer_pattern": "WcW",
        "norm_eps": 0.1,
        "mixer_options": ("rwkv7.decay_rank=4", "rwkv7.rate_rank=5", "rwkv7.gate_rank=6"),
    },
    "h3": {"layer_pattern": "KcK", "mixer_options": ("h3.state_dim=6",)},
    "hyena": {"layer_pattern": "HcH", "mixer_options": ("hyena.filter_units=12", "hyena.length_tokens=96")},
}
"""Settings of a model of two layers of each system, by the name of its mixer."""
KNOWN = mixers_of(ModelConfig(mixers="based_megatron.baselines")).values()
TENSOR = tuple(mixer.name for mixer in KNOWN if mixer.shards and mixer.name in SYSTEMS)
"""Systems whose heads or channels tensor parallel ranks share."""
SLICED = tuple(mixer.name for mixer in KNOWN if mixer.slices and mixer.name in SYSTEMS)
"""Systems that can work on slices of sequences."""
MIXES_DOCUMENTS = ("h3", "hyena")
"""Systems that cannot keep documents apart."""
WITHOUT_STATE = ("hyena",)
"""Systems that cannot decode."""


def config_of(name: str, parallel: ParallelConfig | None = None, **train: Any) -> Config:
    """The config of the layout tests with the model of one system."""
    config = small_config(parallel, **train)
    changes = {"mixers": "based_megatron.baselines", **SYSTEMS[name]}
    data = dataclasses.replace(config.data, isolate_documents=name not in MIXES_DOCUMENTS)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, **changes))
