"""Checks that the mixers of a config can do what it asks, before any rank starts to work; config/validate.py checks the rest."""

from based_megatron.config import Config
from based_megatron.errors import ConfigError
from based_megatron.model.mixers import layer_mixers


def check_mixers(config: Config) -> None:
    """Raise ConfigError, in one line, for an unknown mixer and for the first layer that cannot run as the config wants."""
    pattern = config.model.layer_pattern
    for mixer in dict.fromkeys(layer_mixers(config.model)):
        words = mixer.name.replace("_", " ")
        mixer.check(config.model, config.parallel.tensor)
        if config.parallel.tensor > 1 and not mixer.shards:
            raise ConfigError(
                f"parallel.tensor {config.parallel.tensor} shares heads or channels over ranks, which {words}, letter {mixer.letter} of "
                f"model.layer_pattern {pattern!r}, cannot do; set parallel.tensor=1 or change model.layer_pattern"
            )
        if config.data.isolate_documents and not mixer.isolates:
            raise ConfigError(
                f"data.isolate_documents keeps documents of a sequence apart, which {words}, letter {mixer.letter} of "
                f"model.layer_pattern {pattern!r}, cannot do; set data.isolate_documents=false or change model.layer_pattern"
            )
        if config.data.carry_state and not mixer.carries:
            raise ConfigError(
                f"data.carry_state cannot carry the whole past of {words}, letter {mixer.letter} of model.layer_pattern "
                f"{pattern!r}; set data.carry_state=false or change model.layer_pattern"
            )
        if config.parallel.context > 1 and not mixer.slices:
            raise ConfigError(
                f"parallel.context {config.parallel.context} cuts sequences into slices, which {words}, letter {mixer.letter} of "
                f"model.layer_pattern {pattern!r}, cannot mix; set parallel.context=1 or change model.layer_pattern"
            )
