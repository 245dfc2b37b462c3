"""`based generate`: exports and checkpoints continue text, in batches and alone."""

import dataclasses

import pytest
import torch

from based_megatron.checkpoint.full import read_full, write_full
from based_megatron.config import Config
from based_megatron.config.schema import DataConfig, ModelConfig
from based_megatron.convert.huggingface import export_huggingface, hf_model
from based_megatron.convert.layout import our_shapes
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import BasedError, CheckpointError, ConfigError
from based_megatron.inference.cli import main
from based_megatron.inference.generate import generate, load_model, text_tokenizer
from based_megatron.inference.sampling import Sampling

MODEL = ModelConfig(
    layer_pattern="cLSc", hidden_size=32, ffn_hidden_size=48, num_heads=4, feature_dim=4, window_left=5, vocab_size=261
)
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = ["hello world, said", "x", "the world is"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, its export and its data folder."""
    root = tmp_path_factory.mktemp("generate")
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in our_shapes(MODEL).items()}
    (root / "data").mkdir()
    train_tokenizer(["hello world, said the world"], 261).save(root / "data")
    write_full(root / "run", weights, Config(model=MODEL, data=DataConfig(path=str(root / "data"))))
    export_huggingface(weights, MODEL, root / "export", root / "data")
    return root


@pytest.fixture(scope="module")
def model(places):
    return load_model(places / "run")[0]


@pytest.fixture(scope="module")
def tokenizer(places):
    return text_tokenizer(places / "data")


def test_run_checkpoint_and_export_give_the_same_model_and_tokenizer(places):
    run, run_tokenizer = load_model(places / "run")
    step, _ = load_model(places / "run" / "checkpoints" / "step-00000000")
    export, export_tokenizer = load_model(places / "export")
    for name, tensor in run.state_dict().items():
        assert torch.equal(step.state_dict()[name], tensor) and torch.equal(export.state_dict()[name], tensor), name
    assert (run_tokenizer, export_tokenizer) == (places / "data", places / "export")


def test_loading_an_export_runs_none_of_its_code(places, tmp_path):
    for path in (places / "export").iterdir():
        content = b"raise SystemExit('ran')" if path.suffix == ".py" else path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    assert load_model(tmp_path)[0].config.hidden_size == 32


def test_a_batch_gives_each_prompt_what_it_gets_alone(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, GREEDY)
    alone = [generate(model, tokenizer, [prompt], GREEDY).texts[0] for prompt in PROMPTS]
    assert list(together.texts) == alone and len(set(alone)) == 3


def test_greedy_text_is_that_of_the_full_forward_pass(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(GREEDY.max_new_tokens):
        best = model(ids, use_cache=False).logits[:, -1, : MODEL.vocab_size].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert generate(model, tokenizer, PROMPTS[:1], GREEDY).texts[0] == tokenizer.decode(ids[0, length:])


def test_generation_ends_at_the_end_of_a_document(places, tokenizer):
    model, _ = load_model(places / "run")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] = (
            50
            * model(tokenizer("x", return_tensors="pt")["input_ids"], output_hidden_states=True).hidden_states[-1][
                0, -1
            ]
        )
    result = generate(model, tokenizer, ["x"], GREEDY)
    assert result.texts == ("",) and result.new_tokens == 0


def test_sampling_follows_the_seed_and_leaves_the_global_one_alone(model, tokenizer):
    sampling = Sampling(max_new_tokens=12, seed=3)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = generate(model, tokenizer, PROMPTS, sampling)
    assert torch.equal(torch.rand(1), expected)
    assert generate(model, tokenizer, PROMPTS, sampling).texts == first.texts
    assert generate(model, tokenizer, PROMPTS, dataclasses.replace(sampling, seed=4)).texts != first.texts


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(model, tokenizer, narrow):
    sampling = Sampling(max_new_tokens=12, **narrow)
    assert generate(model, tokenizer, PROMPTS, sampling).texts == generate(model, tokenizer, PROMPTS, GREEDY).texts


def test_top_k_of_zero_is_unlimited(model, tokenizer):
    """transformers would take 50 where nothing is said."""
    texts = generate(model, tokenizer, ["x"] * 400, Sampling(max_new_tokens=1, temperature=1e6)).texts
    assert len(set(texts)) > 60


def test_state_size_does_not_depend_on_the_length(model, tokenizer):
    sizes = [
        generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=n, temperature=0.0)).state_bytes
        for n in (8, 60)
    ]
    features, heads, value = 1 + 4 + 10, 4, 8
    window, conv, linear = 2 * 5 * 32, 2 * 2 * 2 * 32, heads * features * (value + 1)
    assert sizes == [4 * (window + conv + linear)] * 2


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        ([""], GREEDY, "--prompt"),
        (PROMPTS, Sampling(max_new_tokens=0), "--max-new-tokens is 0"),
        (PROMPTS, Sampling(temperature=-1.0), "--temperature is -1.0"),
        (PROMPTS, Sampling(top_k=-1), "--top-k is -1"),
        (PROMPTS, Sampling(top_p=0.0), "--top-p is 0.0"),
    ],
)
def test_impossible_requests_are_refused(model, tokenizer, prompts, sampling, words):
    with pytest.raises(ConfigError, match=words):
        generate(model, tokenizer, prompts, sampling)


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tokenizer):
    config = dataclasses.replace(MODEL, vocab_size=100)
    small = hf_model({name: torch.zeros(shape) for name, shape in our_shapes(config).items()}, config)
    with pytest.raises(ConfigError, match="261 entries, the model 100"):
        generate(small, tokenizer, PROMPTS, GREEDY)


def test_the_gpt2_pair_is_a_tokenizer(shared_dir):
    tokenizer = text_tokenizer(shared_dir / "data")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995] and tokenizer.eos_token_id == 50256


# --- the command


def test_command_prints_text_speed_and_state(places, capsys):
    main(
        [
            str(places / "export"),
            "--prompt",
            "hello",
            "--prompt",
            "world",
            "--max-new-tokens",
            "4",
            "--temperature",
            "0",
        ]
    )
    out = capsys.readouterr().out
    assert out.startswith("hello") and "\nworld" in out and "tokens/s" in out and "bytes a sequence" in out


def test_command_needs_a_tokenizer_from_somewhere(places, tmp_path):
    weights = {name: torch.zeros(shape) for name, shape in our_shapes(MODEL).items()}
    write_full(tmp_path / "run", weights, Config(model=MODEL))
    with pytest.raises(ConfigError, match="set --tokenizer"):
        main([str(tmp_path / "run"), "--prompt", "x"])


def test_command_refuses_what_is_not_a_model(tmp_path):
    with pytest.raises(BasedError):
        main([str(tmp_path), "--prompt", "x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_command_refuses_a_gpu_that_is_not_there(places):
    with pytest.raises(ConfigError, match="set --device cpu"):
        main([str(places / "run"), "--prompt", "x", "--device", "cuda"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "foo"], "--device is 'foo', which is no device"),
        (["--seed", str(2**70)], "--seed is .* whole number of 64 bits"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-p", "0"], "--top-p is 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "\udcff"], "is not text in UTF-8"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(places, arguments, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        main([str(places / "run"), "--prompt", "the", *arguments])
    assert "\n" not in str(caught.value)


def test_a_request_is_looked_at_before_the_model(tmp_path):
    with pytest.raises(ConfigError, match="prompt is empty"):
        main([str(tmp_path / "nowhere"), "--prompt", ""])


def test_weights_that_are_no_numbers_are_refused(places, tmp_path):
    weights, config = read_full(places / "run")
    weights["final_norm.weight"][0] = float("inf")
    write_full(tmp_path / "run", weights, config)
    with pytest.raises(CheckpointError, match=r"final_norm.weight of .* has 1 of 32 values that are nan or infinite"):
        main([str(tmp_path / "run"), "--prompt", "the"])


def test_rows_that_are_no_tokens_are_never_generated(places, tokenizer):
    """The vocabulary of 261 is rounded up to 264 rows; here one of these has the largest logit everywhere."""
    model, _ = load_model(places / "run")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[262:] = 50 * model.model.norm.weight.sign() * torch.tensor([[1.0], [-1.0]])
    batch = tokenizer("the", add_special_tokens=False, return_tensors="pt")
    ids = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)[0, -3:]
    assert (ids >= 261).all(), "these rows win"
    assert generate(model, tokenizer, ["the"], Sampling(max_new_tokens=3, temperature=0)).texts[0]
    assert not tokenizer.decode(ids)
