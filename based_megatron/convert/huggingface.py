"""Conversion between our unsharded state dict and the Hugging Face model of `hf_files`, in memory and as an export folder."""

import hashlib
import inspect
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.checksums import write_checksums
from based_megatron.convert.folder import new_folder
from based_megatron.convert.hf_files.configuration_based import BasedConfig
from based_megatron.convert.hf_files.mixers_based import MIXERS
from based_megatron.convert.hf_files.modeling_based import BasedForCausalLM
from based_megatron.convert.layout import Entry, check_read, our_shapes, short_pattern, to_other, to_ours
from based_megatron.convert.model_card import model_card
from based_megatron.convert.origin import Origin
from based_megatron.convert.proof import Proof, prove
from based_megatron.convert.tokenizer import write_tokenizer
from based_megatron.errors import CheckpointError
from based_megatron.model.mixers import Mixer, layer_mixers, mixers_of

AUTO_MAP = {
    "AutoConfig": "configuration_based.BasedConfig",
    "AutoModel": "modeling_based.BasedModel",
    "AutoModelForCausalLM": "modeling_based.BasedForCausalLM",
}
MIXERS_FILE = "mixers_based.py"
CONFIGURATION_FILE = "configuration_based.py"
HF_FILES = (CONFIGURATION_FILE, "fast_based.py", "inputs_based.py", MIXERS_FILE, "modeling_based.py")


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], BasedConfig]:
    """Weights and config of `BasedForCausalLM`, bit-exact. A tied output projection is not repeated.

    Raises CheckpointError if the tensors do not fit the config.
    """
    return to_other(state_dict, _table(config)), hf_config(config)


def from_hf(
    hf_state_dict: dict[str, Tensor], hf: BasedConfig, mixers: str = ""
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The inverse of to_hf, with the `model.mixers` that it needs. Raises CheckpointError if the tensors do not fit the config."""
    try:
        config = check_read(model_config(hf, mixers))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json is not that of a Based export: {error!r}") from error
    weights = dict(hf_state_dict)
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return to_ours(weights, _table(config)), config


def hf_model(state_dict: dict[str, Tensor], config: ModelConfig) -> BasedForCausalLM:
    """BasedForCausalLM with these weights, in evaluation mode; it shares their memory where it can.

    Raises CheckpointError if the tensors do not fit the config.
    """
    weights, hf = to_hf(state_dict, config)
    with torch.device("meta"):
        model = BasedForCausalLM(hf, MIXERS | extra_classes(config))
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class Form:
    """How the weights of an export are stored."""

    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"
    """The most that a file of weights may have, as transformers writes sizes."""


def export_huggingface(
    state_dict: dict[str, Tensor],
    config: ModelConfig,
    output: Path,
    tokenizer: Path | None = None,
    form: Form = Form(),
    origin: Origin = Origin(),  # noqa: B008  frozen
    license: str = "",
) -> Proof:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, and prove it.

    `state_dict` holds float32 tensors, `tokenizer` is a folder written by `based prep` or one with a tokenizer.json or
    the GPT-2 pair. The folder appears whole or not at all. Returns what was measured, which the model card has too.
    Raises CheckpointError if the output is in the way, the tensors do not fit, or the export is not equal to its
    source; DataError for the tokenizer.
    """
    other = {str(tensor.dtype) for tensor in state_dict.values()} - {"torch.float32"}
    if other:
        raise CheckpointError(
            f"an export takes float32 weights, not {', '.join(sorted(other))}: convert the checkpoint"
        )
    model = hf_model(_rounded(state_dict, form.dtype), config)
    with new_folder(output) as folder:
        model.config.max_position_embeddings = origin.sequence_length_tokens
        model.config.trained_steps, model.config.trained_tokens = origin.step, origin.tokens
        if tokenizer is not None:
            rows = model.config.tokenizer_vocab_size
            encoder = write_tokenizer(tokenizer, folder, rows, origin.sequence_length_tokens)
            for settings in (model.config, model.generation_config):
                settings.eos_token_id = settings.pad_token_id = encoder.eos_id
        model.config.auto_map = AUTO_MAP
        model.to(form.dtype).save_pretrained(folder, max_shard_size=form.max_shard_size)  # type: ignore[arg-type]
        for name in HF_FILES:
            source = resources.files("based_megatron.convert.hf_files") / name
            (folder / name).write_bytes(source.read_bytes())
        _add_mixers(extra_classes(config), folder)
        _tell_apart(folder)
        for weights in folder.glob(
            "*.safetensors"
        ):  # written for the owner only, while the other files follow the umask
            shutil.copymode(folder / "config.json", weights)
        proof = prove(folder, model.float(), form.dtype)
        card = model_card(config, proof, origin, has_tokenizer=tokenizer is not None, license=license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(folder)
    return proof


def _rounded(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The float32 weights that are left of a storage in this dtype. Raises CheckpointError where it holds too small numbers."""
    if dtype == torch.float32:
        return state_dict
    rounded = {name: tensor.to(dtype).float() for name, tensor in state_dict.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            largest = state_dict[name].abs().max().item()
            raise CheckpointError(f"{name} has values up to {largest:.3g}, beyond {dtype}: choose another --dtype")
    return rounded


def extra_classes(config: ModelConfig) -> dict[str, type[nn.Module]]:
    """Classes of the mixers that bring their own, by their name in an export."""
    classes = {_hf_name(mixer, config): mixer.hf_class() for mixer in layer_mixers(config)}
    return {name: cls for name, cls in classes.items() if cls is not None}


def _add_mixers(classes: dict[str, type[nn.Module]], folder: Path) -> None:
    """Copy the files that define the classes, and let the export's own mixers import them: transformers follows its imports."""
    lines = [""] if classes else []
    for name, cls in classes.items():
        file = Path(inspect.getfile(cls))
        if (folder / file.name).exists() and (folder / file.name).read_bytes() != file.read_bytes():
            raise CheckpointError(f"{file} cannot be copied into an export, which has a {file.name} already: rename it")
        shutil.copyfile(file, folder / file.name)
        lines += [f"from .{file.stem} import {cls.__name__}", "", f'MIXERS["{name}"] = {cls.__name__}']
    with (folder / MIXERS_FILE).open("a") as mixers:
        mixers.writelines(f"{line}\n" for line in lines)


def _tell_apart(folder: Path) -> None:
    """Give exports with different model code different config code.

    A process that has loaded one export takes its model for every config of the same class, and transformers makes one class of
    equal config files: https://github.com/huggingface/transformers, `_BaseAutoModelClass.from_pretrained`.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()
    with (folder / CONFIGURATION_FILE).open("a") as configuration:
        configuration.write(f"\n# sha256 of this export's code: {digest}\n")


def _hf_name(mixer: type[Mixer], config: ModelConfig) -> str:
    if mixer.hf_name is None:
        raise CheckpointError(
            f"{mixer.name.replace('_', ' ')} has no form in Hugging Face transformers (hf_name), but model.layer_pattern is "
            f"{config.layer_pattern!r}; such a model cannot be exported"
        )
    return mixer.hf_name


def hf_config(config: ModelConfig) -> BasedConfig:
    """Our config as that of the Hugging Face model."""
    mixers = layer_mixers(config)
    return BasedConfig(
        architectures=["BasedForCausalLM"],
        vocab_size=config.embedding_rows,
        tokenizer_vocab_size=config.vocab_size,
        vocab_multiple=config.vocab_multiple,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=len(mixers),
        num_attention_heads=config.num_heads,
        mixers=[_hf_name(mixer, config) for mixer in mixers],
        extra_mixers={
            _hf_name(mixer, config): mixer.hf_cache_layer for mixer in mixers if mixer.hf_class() is not None
        },
        mixer_options=list(config.mixer_options),
        feature_dim=config.feature_dim,
        feature_map=config.feature_map,
        prefix_tokens=config.prefix_tokens,
        sliding_window=config.window_left + 1,
        conv_kernel=config.conv_kernel,
        conv_expand=config.conv_expand,
        rotary_base=config.rotary_base,
        rotary_fraction=config.rotary_fraction,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
    )


def model_config(hf: BasedConfig, mixers: str = "") -> ModelConfig:
    """The inverse of hf_config; the layer pattern comes back in its short form.

    mixers: `model.mixers`, which an export does not name, so that no module is imported because a downloaded file says so.
    Raises CheckpointError for a mixer that is not found there or in an installed package.
    """
    letters = {mixer.hf_name: letter for letter, mixer in mixers_of(ModelConfig(mixers=mixers)).items()}
    unknown = sorted(set(hf.mixers) - letters.keys())
    if unknown:
        raise CheckpointError(
            f"the export has unknown mixers: {', '.join(unknown)}; install their package, or give based import its module with --mixers"
        )
    return ModelConfig(
        layer_pattern=short_pattern("".join(letters[name] for name in hf.mixers)),
        mixers=mixers,
        mixer_options=tuple(hf.mixer_options),
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        feature_dim=hf.feature_dim,
        feature_map="rebased" if hf.feature_map == "rebased" else "taylor",
        prefix_tokens=hf.prefix_tokens,
        window_left=hf.sliding_window - 1,
        conv_kernel=hf.conv_kernel,
        conv_expand=hf.conv_expand,
        rotary_base=hf.rotary_base,
        rotary_fraction=hf.rotary_fraction,
        norm_eps=hf.rms_norm_eps,
        vocab_size=hf.tokenizer_vocab_size,
        vocab_multiple=hf.vocab_multiple,
        tie_embeddings=hf.tie_word_embeddings,
        init_std=hf.initializer_range,
    )


def _table(config: ModelConfig) -> list[Entry]:
    """Our tensors and those of BasedForCausalLM."""
    D, F = config.hidden_size, config.ffn_hidden_size
    top = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    mixers = layer_mixers(config)
    table = []
    for name, shape in our_shapes(config).items():
        if name in top:
            table.append(Entry(name, shape, ((top[name], shape),)))
            continue
        _, index, local = name.split(".", 2)
        parts: dict[str, tuple[int, ...]] = {local: shape}
        if local == "mlp.fc1.weight":
            parts = {"mlp.up_proj.weight": (F, D), "mlp.gate_proj.weight": (F, D)}
        elif local == "mlp.fc2.weight":
            parts = {"mlp.down_proj.weight": shape}
        elif local.startswith("mixer."):
            of_mixer = mixers[int(index)].hf_parts(config, local.removeprefix("mixer."))
            parts = {f"mixer.{part}": part_shape for part, part_shape in of_mixer.items()}
        prefix = f"model.layers.{index}"
        table.append(Entry(name, shape, tuple((f"{prefix}.{part}", part_shape) for part, part_shape in parts.items())))
    return table
