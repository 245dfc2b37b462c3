"""Whole runs of `based eval` on a tiny model: files that it writes, refusals of models, and the same results on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import loaded, write_tiny

from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.errors import BasedError, CheckpointError, ConfigError, DataError
from based_megatron.evaluation.cli import EvalConfig
from based_megatron.evaluation.models import cut_before
from based_megatron.evaluation.run import evaluate, prepared
from based_megatron.evaluation.tasks import chosen_tasks
from based_megatron.inference.source import read_source, tokenizer_of
from support.runs import start_command

LIMIT = 6
TASKS = "phonebook,metadata"


def evaluated(model: Path, output: Path, tasks: str, **options: Any) -> list[dict[str, Any]]:
    """Results of the tasks on the ranks of a pool, as eval.json has them."""
    config = EvalConfig(model, tasks=tasks, limit=LIMIT, output=output, batch=4, **options)
    chosen = chosen_tasks(tasks.split(","), config.data, offline=True)
    language = loaded(model, batch=4)
    asks = prepared(config, config.contexts(), chosen, language.model, language.tokenizer, all_ranks())
    evaluate(asks, language, output, {"model": str(model)})
    return json.loads((output / "eval.json").read_text())["results"] if all_ranks().rank == 0 else []


def without_time(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in results]


def on_one_rank(root: Path, output: Path) -> dict[str, Any]:
    """Results of the run, of its export, and of the rows that were written, asked again."""
    runs = {"run": root / "run", "export": root / "export"}
    found = {name: evaluated(model, output / name, TASKS, context="300") for name, model in runs.items()}
    return found | {"again": evaluated(root / "run", output / "again", TASKS, data=output / "run" / "data")}


@pytest.fixture(scope="module")
def alone(worker_pool, tiny_root, tmp_path_factory):
    """What one rank finds, and the folder with its files: a process for all."""
    folder = tmp_path_factory.mktemp("alone")
    return worker_pool(1).run(on_one_rank, tiny_root, folder)[0], folder


def test_run_and_export_give_the_same_results(alone):
    found, _ = alone
    assert without_time(found["run"]) == without_time(found["export"])
    assert [result["task"] for result in found["run"]] == ["phonebook", "metadata"]
    for result in found["run"]:
        assert result["rows"] == LIMIT and result["data"] == "generated here"
        assert set(result["baselines"]) == {"no context", "majority"}
        assert result["computed_tokens"] < result["alone_tokens"]


def test_two_ranks_give_the_same_results_and_files(worker_pool, alone, tiny_root, tmp_path):
    found, folder = alone
    both, nothing = worker_pool(2).run(evaluated, tiny_root / "run", tmp_path, TASKS, context="300")
    assert without_time(both) == without_time(found["run"]) and nothing == []
    for file in ("answers/phonebook.jsonl", "data/phonebook/validation.jsonl", "data/metadata/validation.jsonl"):
        assert (tmp_path / file).read_text() == (folder / "run" / file).read_text()
        assert len((tmp_path / file).read_text().splitlines()) == LIMIT
    assert "| phonebook |" in (tmp_path / "eval.md").read_text()


def refusal_of(model: Path, output: Path, data: Path) -> str:
    """What this rank says of a folder of rows."""
    with pytest.raises(DataError) as error:
        evaluated(model, output, "phonebook", data=data)
    return str(error.value)


def test_rows_that_the_first_rank_cannot_read_are_refused_on_all(worker_pool, tiny_root, tmp_path):
    """Others do not wait for rows that never come."""
    (tmp_path / "phonebook.jsonl").write_text("no JSON\n")
    found = worker_pool(2).run(refusal_of, tiny_root / "run", tmp_path / "out", tmp_path)
    assert len(found) == 2 and all("phonebook.jsonl line 1 is no JSON" in line for line in found)


def test_rows_that_were_written_are_asked_again(alone):
    found, folder = alone
    again, first = without_time(found["again"]), without_time(found["run"])
    assert again[0].pop("data") == str(folder / "run" / "data" / "phonebook") and first[0].pop("data")
    assert again[0] == first[0]


def test_the_command_runs_to_its_end(tiny_root, tmp_path):
    job = start_command(
        ["eval", str(tiny_root / "run"), "--tasks", "phonebook", "--limit", "4", "--output", str(tmp_path / "out")],
        tmp_path / "stderr",
    )
    job.wait(120)
    assert job.returncode == 0, job.stderr
    assert "phonebook" in job.stdout and str(tmp_path / "out" / "eval.json") in job.stdout
    facts = json.loads((tmp_path / "out" / "eval.json").read_text())["facts"]
    assert facts["ranks"] == "1" and facts["precision"] == "fp32" and "decoding states" in facts["path"]
    assert facts["command"].startswith("based eval")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        read_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="another kind"):
        read_source(tmp_path)


def test_a_model_without_a_known_tokenizer_asks_for_one(tiny_root):
    source = read_source(tiny_root / "run")
    assert len(tokenizer_of(source, None, tiny_root)) <= source.model.vocab_size
    assert source.sequence_length_tokens == 2048
    with pytest.raises(BasedError, match="no tokenizer"):
        tokenizer_of(source, tiny_root, tiny_root)


def refused(root: Path, wide: Path) -> list[str]:
    messages = []
    config = EvalConfig(root / "run", tasks="phonebook")
    from based_megatron.evaluation import models
    from based_megatron.evaluation.run import _check_lengths

    source = read_source(config.model)
    with pytest.raises(ConfigError) as caught:
        models.language_model(source, tokenizer_of(source, wide, wide), None, "fp32", 4, all_ranks())  # type: ignore[arg-type]
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        _check_lengths(read_source(root / "full" / "run"), (1500,), read_twice=True)
    messages.append(str(caught.value))
    return messages


def test_tokenizers_and_contexts_that_do_not_fit_are_refused(worker_pool, tiny_root, tmp_path):
    from based_megatron.data_prep.tokenizer import train_tokenizer

    train_tokenizer([f"word{i} other{i * 7}" for i in range(300)] * 3, 400).save(tmp_path)
    write_tiny(tiny_root / "full", "cLSA")
    too_wide, too_long = worker_pool(1).run(refused, tiny_root, tmp_path)[0]
    assert "the model 300" in too_wide and "--tokenizer" in too_wide
    assert "1500 with --read-twice" in too_long and "2048 positions" in too_long


def test_texts_end_before_the_first_stop():
    assert cut_before("a\nb.c", ["\n", "."]) == "a"
    assert cut_before("b.c\na", ["\n", "."]) == "b"
    assert cut_before("abc", ["", "x"]) == "abc"
