"""Options of mixers: words NAME.KEY=VALUE reach the class that declares them, checked, and all others are refused in one line."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from based_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, from_dict, parse_config, to_dict
from based_megatron.config.changes import changed_settings, refused_changes
from based_megatron.config.limits import Range
from based_megatron.convert.huggingface import hf_config, model_config
from based_megatron.errors import ConfigError
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import MIXERS, layer_mixers
from based_megatron.model.mixers.gated_conv import GatedConv
from based_megatron.model.mixers.options import NoOptions


@dataclass(frozen=True)
class ConvOptions:
    """Options of every kind."""

    width: Annotated[int, Range(at_least=1)] = 64
    rate: float = 0.5
    gated: bool = True
    norm: Literal["rms", "none"] = "rms"


@pytest.fixture(autouse=True)
def conv_with_options(monkeypatch):
    monkeypatch.setattr(GatedConv, "Options", ConvOptions)
    layer_mixers.cache_clear()
    yield
    layer_mixers.cache_clear()


def with_options(*words: str, pattern: str = "cLS") -> Config:
    return Config(model=ModelConfig(layer_pattern=pattern, mixer_options=words))


def test_words_become_typed_values():
    config = with_options(
        "gated_conv.width=8", "gated_conv.rate=1e-3", "gated_conv.gated=false", "gated_conv.norm=none"
    )
    check_mixers(config)
    assert GatedConv.options(config.model) == ConvOptions(8, 1e-3, False, "none")


def test_what_is_not_set_has_its_default():
    assert GatedConv.options(with_options("gated_conv.width=8").model) == ConvOptions(width=8)
    assert MIXERS["L"].options(ModelConfig()) == NoOptions()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("gated_conv.width", r"'gated_conv\.width', which is not of the form NAME\.KEY=VALUE"),
        ("width=8", "which is not of the form"),
        ("gated_conv.width=8\n", "which is not of the form"),
        ("conv.width=8", r"'conv\.width=8', but the mixers of model\.layer_pattern 'cLS' are gated_conv, linear_att"),
        ("full_attention.width=8", r"but the mixers of model\.layer_pattern 'cLS' are"),
        ("linear_attention.width=8", r"sets linear_attention\.width, which is no option of this mixer \(it has none\)"),
        ("gated_conv.widht=8", r"sets gated_conv\.widht, .*did you mean width\?"),
        ("gated_conv.width=8.0", r"sets gated_conv\.width to '8\.0', but it must be a whole number"),
        ("gated_conv.rate=fast", r"sets gated_conv\.rate to 'fast', but it must be a number"),
        ("gated_conv.gated=1", r"sets gated_conv\.gated to '1', but it must be true or false"),
        ("gated_conv.norm=layer", r"sets gated_conv\.norm to 'layer', but it must be one of rms, none"),
        ("gated_conv.width=0", r"model\.mixer_options gated_conv\.width is 0, but must be a whole number at least 1"),
        ("gated_conv.rate=nan", r"model\.mixer_options gated_conv\.rate is nan, but must be a finite number"),
        ("gated_conv.rate=-1", r"model\.mixer_options gated_conv\.rate is -1\.0, .*at least 0"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(word, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        check_mixers(with_options(word))
    assert "model.mixer_options" in str(error.value) and "\n" not in str(error.value)


def test_an_option_is_set_once():
    with pytest.raises(ConfigError, match=r"sets gated_conv\.width twice"):
        check_mixers(with_options("gated_conv.width=8", "gated_conv.width=8"))


def test_options_are_part_of_the_command_line_the_run_and_its_identity():
    config = parse_config(["--config", "tiny", "--model.mixer-options", "gated_conv.width=8", "gated_conv.rate=2"])
    assert config.model.mixer_options == ("gated_conv.width=8", "gated_conv.rate=2")
    assert from_dict(to_dict(config)) == config and hash(from_dict(to_dict(config)).model)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, mixer_options=("gated_conv.width=9",)))
    changes = changed_settings(Config, to_dict(config), to_dict(other))
    assert list(refused_changes(Config, changes, ())) == ["model.mixer_options"]


def test_an_export_has_them():
    model = with_options("gated_conv.width=8").model
    assert hf_config(model).mixer_options == ["gated_conv.width=8"]
    assert model_config(hf_config(model)) == model


def refuse_three(model: ModelConfig, tensor: int) -> None:
    if tensor == 3:
        raise ConfigError("3 ranks cannot share 4 heads")


@pytest.mark.parametrize(
    ("fact", "changes", "expected"),
    [
        (("shards", False), {"parallel": ParallelConfig(tensor=2)}, r"parallel\.tensor 2.*gated conv, letter c.*cannot do"),
        (("isolates", False), {"data": DataConfig(isolate_documents=True)}, r"data\.isolate_documents.*gated conv, letter c"),
        (("check", refuse_three), {"parallel": ParallelConfig(tensor=3)}, "3 ranks cannot share 4 heads"),
    ],
)  # fmt: skip
def test_what_a_class_says_it_cannot_do_is_refused(fact, changes, expected, monkeypatch):
    check_mixers(dataclasses.replace(with_options(), **changes))
    monkeypatch.setattr(GatedConv, *fact)
    with pytest.raises(ConfigError, match=expected) as error:
        check_mixers(dataclasses.replace(with_options(), **changes))
    assert "\n" not in str(error.value)
    allowed = dataclasses.replace(with_options(), data=DataConfig(isolate_documents=False))
    check_mixers(allowed)
