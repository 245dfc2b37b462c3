"""Names of tasks, what is refused before a model is loaded, and the report."""

import json

import pytest

from based_megatron.cli import main
from based_megatron.errors import ConfigError
from based_megatron.evaluation import tasks as tasks_module
from based_megatron.evaluation.cli import EvalConfig
from based_megatron.evaluation.report import Report, Slice, TaskResult, to_markdown, write
from based_megatron.evaluation.tasks import GENERATED, GROUPS, Task, chosen_tasks


@pytest.fixture
def harness(monkeypatch, tmp_path_factory):
    """Whether lm-eval is installed, as the command sees it; it is, and has a task niah_multiquery."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks" / "ruler").mkdir(parents=True)
    (folder / "tasks" / "ruler" / "niah_multiquery.yaml").touch()

    def there(answer: bool) -> None:
        monkeypatch.setattr(tasks_module, "lm_eval_folder", lambda: folder if answer else None)

    there(True)
    return there


def test_groups_become_their_tasks_each_once(harness):
    tasks = chosen_tasks(["commonsense", "piqa", "generated"], None, offline=False)
    assert [task.name for task in tasks] == [*GROUPS["commonsense"], *GENERATED]
    assert [task.kind for task in tasks] == ["stock"] * 6 + ["generated"] * 3


def test_rows_are_taken_from_the_data_folder(harness, tmp_path):
    (tmp_path / "swde").mkdir()
    for name in ("phonebook.jsonl", "mine.jsonl"):
        (tmp_path / name).touch()
    assert chosen_tasks(["swde", "phonebook", "mine"], tmp_path, offline=True) == [
        Task("swde", "stock", tmp_path / "swde"),
        Task("phonebook", "generated", tmp_path / "phonebook.jsonl"),
        Task("mine", "local", tmp_path / "mine.jsonl"),
    ]


def refusal(names: list[str], data=None, offline: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        chosen_tasks(names, data, offline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_offline_tasks_without_rows_name_the_paths_tried(harness, tmp_path):
    message = refusal(["fda"], tmp_path, offline=True)
    assert str(tmp_path / "fda.jsonl") in message and f"{tmp_path / 'fda'}" in message and "--offline" in message
    assert "--data" in refusal(["fda"], offline=True)
    assert chosen_tasks([*GENERATED, "niah_single_1"], None, offline=True), "rows are made here"


@pytest.mark.parametrize(
    ("typed", "meant"), [("swdee", "swde"), ("phone-book", "phonebook"), ("super_glue", "super-glue")]
)
def test_unknown_tasks_name_those_that_are_near(harness, typed, meant):
    assert meant in refusal([typed])


def test_a_task_of_lm_eval_is_no_typo_of_ours(harness):
    assert chosen_tasks(["niah_multiquery"], None, offline=False) == [Task("niah_multiquery", "stock")]
    assert "niah_multikey" in refusal(["niah_multikex_1"])


def test_lm_eval_is_found_without_its_import():
    pytest.importorskip("lm_eval")
    folder = tasks_module.lm_eval_folder()
    assert folder is not None and tasks_module.has_task_file(folder, "piqa")
    assert not tasks_module.has_task_file(folder, "piqqa")


def test_no_task_is_refused(harness):
    assert "--tasks" in refusal([])


def test_a_data_folder_that_is_not_there_is_refused(harness, tmp_path):
    assert str(tmp_path / "nowhere") in refusal(["metadata"], tmp_path / "nowhere")


def test_without_lm_eval_its_tasks_name_the_extra(harness):
    harness(False)
    message = refusal(["metadata", "swde"])
    assert "swde" in message and "based-megatron[eval]" in message and "metadata" in message
    assert [task.name for task in chosen_tasks(["generated"], None, offline=False)] == list(GENERATED)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "512,x"], "--context"),
        (["--context", "0"], "--context"),
        (["--batch", "0"], "--batch"),
        (["--limit", "-1"], "--limit"),
        (["--tasks", "swd"], "swde"),
        (["--tasks", ""], "--tasks"),
    ],
)
def test_wrong_options_are_one_line(arguments, words, tmp_path, capsys):
    assert main(["eval", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "nowhere")]) == 2
    assert f"there is no {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_contexts_are_numbers_in_order(tmp_path):
    assert EvalConfig(tmp_path, context="1024, 512,512").contexts() == (512, 1024)
    assert EvalConfig(tmp_path).contexts() == ()


RESULT = TaskResult(
    task="metadata",
    version="1",
    rows=48,
    metrics={"contains": 0.25},
    data="generated here",
    data_hash="abc",
    prompt_hash="def",
    prompt="read twice",
    standard_errors={"contains": 0.0625},
    baselines={"no context": 0.02, "majority": 0.0},
    slices=[Slice("distance 0 to 128", 12, 0.5, 0.0)],
    computed_tokens=1234,
    alone_tokens=5678,
    seconds=2.5,
)


def test_the_page_shows_what_one_needs_to_compare():
    page = to_markdown(Report({"model": "runs/a|b"}, [RESULT]))
    for words in ("contains 0.2500 ± 0.0625", "no context 0.0200", "`abc`", "`def`", "1,234", "5,678", "2.5"):
        assert words in page
    assert "| metadata | distance 0 to 128 | 12 | 0.5000 | 0.0000 |" in page


def test_the_json_holds_every_number(tmp_path):
    data, page = write(Report({"model": "m"}, [RESULT]), tmp_path)
    (result,) = json.loads(data.read_text())["results"]
    assert result["metrics"] == {"contains": 0.25} and result["slices"][0]["rows"] == 12
    assert result["data_hash"] == "abc" and result["computed_tokens"] == 1234
    assert page.read_text().startswith("# based eval\n")
