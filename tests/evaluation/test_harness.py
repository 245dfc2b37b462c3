"""lm-eval's tasks: our model class gives what its Hugging Face class gives, and local rows are asked with its prompts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_model import WORDS, loaded

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'based-megatron[eval]'")

from based_megatron.errors import ConfigError, DataError
from based_megatron.evaluation.tasks import Task

NEW_TOKENS = 24


def requests() -> tuple[list[Any], list[Any], list[Any]]:
    """Choices after contexts, whole texts, and prompts with their ends."""
    from lm_eval.api.instance import Instance

    rng = random.Random(0)

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    contexts = [text(60) for _ in range(12)]
    choices = [Instance("loglikelihood", {}, (context, f" {text(5)}"), i) for context in contexts for i in range(3)]
    choices += [Instance("loglikelihood", {}, pair, 0) for pair in (("", " hello"), ("one ", "two"), ("one", "one"))]
    texts = [Instance("loglikelihood_rolling", {}, (text(n),), 0) for n in (3, 100, 200)]
    options = {"until": ["\n", "or"], "max_gen_toks": NEW_TOKENS}
    prompts = [Instance("generate_until", {}, (context, options), 0) for context in contexts]
    prompts += [Instance("generate_until", {}, (context, {"until": "a"}), 0) for context in contexts[:2]]
    return choices, texts, prompts


def asked_of(model: Any) -> tuple[Any, Any, Any]:
    choices, texts, prompts = requests()
    return model.loglikelihood(choices), model.loglikelihood_rolling(texts), model.generate_until(prompts)


def both(export: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    from based_megatron.evaluation.harness import HarnessModel

    theirs = HFLM(str(export), trust_remote_code=True, dtype="float32", device="cpu", batch_size=4, max_length=2048)
    return asked_of(HarnessModel(loaded(export, batch=4))), asked_of(theirs)


def test_our_model_class_equals_lm_evals(worker_pool, tiny_root):
    """Log-likelihoods to 1e-5 (sums of up to thousands of nats: to fp32), every generation, every greedy flag."""
    (((choices, texts, answers), expected),) = worker_pool(1).run(both, tiny_root / "export")
    for (found, is_greedy), (right, right_greedy) in zip(choices, expected[0], strict=True):
        assert found == pytest.approx(right, rel=1e-6, abs=1e-5) and is_greedy == right_greedy
    assert texts == pytest.approx(expected[1], rel=1e-6, abs=1e-5)
    assert answers == expected[2] and len(set(answers)) > 6


def local_data(folder: Path) -> Path:
    def rows(task: str, split: str, rows: list[dict[str, Any]]) -> None:
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    document = " ".join(f"the author of book {i} is person{i}x." for i in range(12))
    of_book = {"text": f"{document}\n\nauthor of book 3:", "value": "person3x", "key": "author of book 3"}
    rows("swde", "validation", [of_book] * 3)
    cloze = {"context": f"{document} The author is", "question": "The author is", "answers": ["person3x", "nobody"]}
    rows("based_drop", "validation", [cloze] * 3)
    for split in ("train", "validation"):
        rows(
            "piqa",
            split,
            [{"goal": f"open {i}", "sol1": "by hand", "sol2": "a page", "label": i % 2} for i in range(4)],
        )
    return folder


def stock_results(root: Path, data: Path) -> dict[str, Any]:
    """By task and changes: the results, the samples of the last one, and the prompts."""
    from based_megatron.evaluation.harness import stock_tasks

    model = loaded(root / "run")
    asked: list[str] = []

    def answer(prompts: Any, *options: Any) -> list[str]:
        asked.extend(prompts)
        return [" it is PERSON3X" for _ in prompts]

    found: dict[str, Any] = {}
    for name, contexts, read_twice in (
        ("piqa", (40,), True),
        ("swde", (), False),
        ("swde", (40, 50), True),
        ("based_drop", (), False),
    ):
        tasks = stock_tasks(Task(name, "stock", data / name), model.tokenizer, contexts=contexts, read_twice=read_twice)
        asked.clear()
        if name != "piqa":
            object.__setattr__(model, "write", answer)
        outcomes = [task.ask(model, limit=2) for task in tasks]
        changes = " changed" if contexts else ""
        found[name + changes] = [result for result, _ in outcomes], len(outcomes[-1][1]), list(asked)
    return found


def test_local_rows_are_asked_with_lm_evals_prompts(worker_pool, tiny_root, tmp_path):
    (found,) = worker_pool(1).run(stock_results, tiny_root, local_data(tmp_path))
    (piqa,), samples, _ = found["piqa changed"]
    assert (
        piqa.prompt == ""
        and set(piqa.metrics) == {"acc", "acc_norm"}
        and piqa.rows == samples == 2
        and piqa.version == "1.0"
    )
    (swde,), _, prompts = found["swde"]
    assert swde.version == "1" and swde.metrics == {"contains": 1.0} and swde.data == str(tmp_path / "swde")
    assert prompts[0].endswith("is person11x.\n\nauthor of book 3:") and prompts[0].startswith("the author of book 0")
    (cut, wider), _, (prompt, *_) = found["swde changed"]
    document, again, question = prompt.split("\n\n")
    assert document == again and "person3x" in document and "book 11" not in document
    assert question == "author of book 3:" and cut.prompt == "context 40, read twice"
    assert wider.prompt == "context 50, read twice" and wider.prompt_hash != cut.prompt_hash
    assert cut.data_hash == swde.data_hash and cut.prompt_hash != swde.prompt_hash
    (drop,), _, prompts = found["based_drop"]
    assert prompts[0].endswith("person11x. The author is") and prompts[0].count("The author is") == 1
    assert drop.metrics == {"contains": 1.0}


def stock_refusals(root: Path, empty: Path) -> list[str]:
    from based_megatron.evaluation.harness import HarnessModel, stock_tasks

    model, messages = loaded(root / "run"), []
    options: dict[str, Any] = {"contexts": (), "read_twice": False}
    wrong = empty / "wrong.jsonl"
    wrong.write_text('{"txt": "a"}\n')
    sampled = requests()[2][:1]
    sampled[0].arguments = ("one", {"do_sample": True})
    for error, attempt in (
        (DataError, lambda: stock_tasks(Task("swde", "stock", wrong), model.tokenizer, **options)),
        (DataError, lambda: stock_tasks(Task("piqa", "stock", empty), model.tokenizer, **options)),
        (ConfigError, lambda: stock_tasks(Task("piqqa", "stock", empty), model.tokenizer, **options)),
        (ConfigError, lambda: HarnessModel(model).generate_until(sampled)),
    ):
        with pytest.raises(error) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


@pytest.mark.slow  # lm-eval reads all its thirteen thousand tasks to know a name
def test_what_lm_eval_cannot_do_is_one_line(worker_pool, tiny_root, tmp_path):
    no_column, no_rows, no_task, sampling = worker_pool(1).run(stock_refusals, tiny_root, tmp_path)[0]
    assert "--data FOLDER/swde" in no_column and "KeyError: 'text'" in no_column
    assert "--data FOLDER/piqa" in no_rows and "\n" not in no_rows
    assert "piqqa" in no_task and "piqa" in no_task
    assert "greedy" in sampling
