"""`based generate`: runs, checkpoints and exports continue text, by one decoder."""

import contextlib
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from based_megatron.checkpoint.full import read_full, write_full
from based_megatron.config import Config
from based_megatron.config.schema import DataConfig
from based_megatron.convert.huggingface import hf_model
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import BasedError, CheckpointError, ConfigError
from based_megatron.inference.choice import Work
from based_megatron.inference.cli import main
from based_megatron.inference.decoder import Placement, load_decoder
from based_megatron.inference.generate import InOrder
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.source import check_tokenizer, read_source, text_tokenizer
from based_megatron.inference.text import TextRequest, TextUpdate
from based_megatron.parallel.host import environment
from support.decoding import FULL_ATTENTION, MODEL, weights_of

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = ["hello world, said", "x", "the world is"]
CPU = Placement("cpu", slots=2)


@pytest.fixture(scope="module")
def tokenizer(places):
    return text_tokenizer(places / "data")


def test_run_checkpoint_and_export_give_the_same_weights_and_tokenizer(places):
    run, step, export = (read_source(places / path) for path in ("run", "run/checkpoints/step-00000000", "export"))
    for name, tensor in run.weights.items():
        assert torch.equal(step.weights[name], tensor) and torch.equal(export.weights[name], tensor), name
    assert (run.tokenizer, export.tokenizer) == (places / "data", places / "export")


def test_loading_an_export_runs_none_of_its_code(places, tmp_path):
    for path in (places / "export").iterdir():
        content = b"raise SystemExit('ran')" if path.suffix == ".py" else path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    assert read_source(tmp_path).model == read_source(places / "export").model


def test_texts_are_those_of_the_export_in_transformers(places, tokenizer):
    """The command's decoder in fp32 against transformers' generate of each prompt."""
    found = load_decoder(places / "run", CPU).complete([TextRequest(prompt, GREEDY) for prompt in PROMPTS])
    model = hf_model(weights_of(), MODEL)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        batch = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **batch,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            suppress_tokens=list(range(MODEL.vocab_size, MODEL.embedding_rows)),
        )
        ids = output[0, batch["input_ids"].shape[1] :].tolist()
        assert completion.text == tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id])


def test_sampling_follows_the_seed_and_leaves_the_global_one_alone(places):
    decoder = load_decoder(places / "export", CPU)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    requests = [TextRequest(prompt, Sampling(max_new_tokens=12, seed=3)) for prompt in PROMPTS]
    first = [decoder.add(request) for request in requests]
    texts = dict.fromkeys(first, "")
    while decoder.batcher.is_busy:
        for update in decoder.step():
            texts[update.request] += update.text
    assert torch.equal(torch.rand(1), expected)
    again = load_decoder(places / "export", CPU).complete(requests)
    assert [each.text for each in again] == list(texts.values())
    other = [dataclasses.replace(request, sampling=Sampling(max_new_tokens=12, seed=4)) for request in requests]
    assert load_decoder(places / "export", CPU).complete(other) != again


def test_a_model_in_bf16_decodes(places):
    found = load_decoder(places / "run", Placement("cpu", "bf16")).complete([TextRequest("hello", GREEDY)])
    assert found[0].tokens == 12 or found[0].finish == "stop"


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="261 entries, the model 100"):
        check_tokenizer(tokenizer, dataclasses.replace(MODEL, vocab_size=100))


def test_tokens_that_the_tokenizer_lacks_are_never_generated(places, tmp_path):
    """The model has 261 of them and a larger logit for each of the last; the tokenizer has 258."""
    train_tokenizer(["hello world"], 258).save(tmp_path)
    decoder = load_decoder(places / "run", CPU, tokenizer=tmp_path)
    logits = torch.zeros(1, MODEL.embedding_rows)
    logits[:, 258:] = 9.0
    token = torch.zeros(1, dtype=torch.int64)
    for sampling in (GREEDY, Sampling(top_k=3)):
        decoder.loop.choice.set_row(0, sampling, [1])
        one = decoder.loop.choice.rows(torch.tensor([0]))
        one.choose(logits, torch.tensor([0.999], dtype=torch.float64), token, Work.of([sampling]))
        assert token.item() < 258


def test_the_gpt2_pair_is_a_tokenizer(shared_dir):
    tokenizer = text_tokenizer(shared_dir / "data")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995] and tokenizer.eos_token_id == 50256


def test_texts_are_written_in_order_as_they_come():
    stream = io.StringIO()
    sink = InOrder([TextRequest("A:"), TextRequest("B:")], stream)
    sink.write(TextUpdate(1, "later", 1, None))
    assert stream.getvalue() == "A:"
    sink.write(TextUpdate(0, " one", 1, None))
    sink.write(TextUpdate(1, " still", 1, "stop"))
    assert stream.getvalue() == "A: one"
    sink.write(TextUpdate(0, ".", 1, "length"))
    assert stream.getvalue() == "A: one.\n\nB:later still\n\n"


# --- the command


def run(capsys, *arguments: str) -> tuple[str, str]:
    main([*map(str, arguments), "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0"])
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_command_prints_text_and_says_what_it_measured(places, capsys):
    out, err = run(capsys, places / "export", "--prompt", "hello", "--prompt", "world")
    assert re.fullmatch(r"hello(.|\n)+\n\nworld(.|\n)+\n\n", out)
    read, decoded, state = err.split("; ")
    assert "prompt tokens read" in read and "tokens/s" in decoded and "whatever its length" in state
    # Window rings; inputs of 64 channels of 2 convolutions; buffered keys and values, moments with their sums, counts; a position.
    window, conv, linear = 2 * 6 * 32, 2 * 2 * 64, 4 * (16 * (4 + 8) + 15 * 9 + 1)
    assert f"state {4 * (window + conv + linear) + 8:,} bytes" in state


def test_the_printed_state_does_not_depend_on_the_prompt(places, capsys):
    states = [run(capsys, places / "run", "--prompt", "x" * n)[1].split("; ")[2] for n in (1, 60)]
    assert states[0] == states[1]


def test_command_prints_json_lines(places, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "x"}\n{"prompt": "hello", "seed": 3}'))
    )
    out, _ = run(capsys, places / "run", "--jsonl", "-", "--json", "--slots", "1")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["request"], line["prompt"]) for line in lines] == [(0, "x"), (1, "hello")]
    assert all(line["finish"] in ("stop", "length") and line["tokens"] <= 4 for line in lines)


def test_command_saves_and_uses_the_states_of_a_start(places, capsys, tmp_path):
    whole, _ = run(capsys, places / "run", "--prompt", "hello world, said")
    _, err = run(capsys, places / "run", "--prompt", "hello world", "--save-prefix", tmp_path / "start")
    assert "wrote the states of" in err
    out, err = run(capsys, places / "run", "--prompt", "hello world, said", "--prefix", tmp_path / "start")
    assert out == whole


@pytest.fixture(scope="module")
def full_attention(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    write_full(
        folder, weights_of(FULL_ATTENTION), Config(model=FULL_ATTENTION, data=DataConfig(path=str(places / "data")))
    )
    return folder


def test_a_model_with_full_attention_says_that_its_state_grows(full_attention, capsys, tmp_path):
    out, err = run(capsys, full_attention, "--prompt", "hello", "--prompt", "x")
    assert out.startswith("hello") and "grows with the text (full attention)" in err
    with pytest.raises(ConfigError, match="leave --prefix out"):
        run(capsys, full_attention, "--prompt", "hello", "--prefix", tmp_path)
    with pytest.raises(ConfigError, match="leave --save-prefix out"):
        run(capsys, full_attention, "--prompt", "hello", "--save-prefix", tmp_path / "x")


def on_a_rank(arguments: list[str], ranks: int) -> str:
    """What the command prints on this rank of a job that shares the model, or its refusal."""
    rank = dist.get_rank()
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    out = io.StringIO()
    with environment(**{name: str(value) for name, value in place.items()}), contextlib.redirect_stdout(out):
        try:
            main([*arguments, "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"])
        except ConfigError as refusal:
            return str(refusal)
    return out.getvalue()


@pytest.mark.slow
def test_ranks_of_a_job_share_the_model_and_one_prints(places, full_attention, capsys, worker_pool):
    prompts = ["--prompt", "hello", "--prompt", "world, said"]
    expected, _ = run(capsys, places / "run", *prompts)
    assert worker_pool(2).run(on_a_rank, [str(places / "run"), *prompts], 2) == [expected, ""]
    for arguments, reason in (
        ([str(full_attention), "--prompt", "x"], "decodes on one rank, not on 2"),
        ([str(places / "run"), "--prompt-file", "-"], "standard input reaches one of the 2 ranks"),
        ([str(places / "run"), "--prompt", "x", "--prefix", "y"], "leave --prefix and --save-prefix out"),
    ):
        assert all(reason in refusal for refusal in worker_pool(2).run(on_a_rank, arguments, 2))


def test_command_needs_a_tokenizer_from_somewhere(tmp_path):
    write_full(tmp_path / "run", weights_of(), Config(model=MODEL))
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
        (["--device", "meta"], "--device is 'meta', but models run on cpu and cuda only"),
        (["--seed", str(2**70)], "--seed is .* whole number of 64 bits"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--top-p", "0"], "--top-p is 0"),
        (["--min-p", "1.5"], "--min-p is 1.5"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--slots", "-1"], "--slots is -1"),
        (["--prompt", "\udcff"], "is not text in UTF-8"),
        (["--stop", "\udcff"], "--stop .* is not text in UTF-8"),
        (["--prompt", "y", "--save-prefix", "z"], "--save-prefix writes the states of one prompt, not of 2"),
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
