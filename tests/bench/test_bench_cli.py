"""`based bench` at tiny sizes: it checks, times, writes, and says by its exit code whether a check failed."""

import json

import pytest
import torch

from based_megatron import cli
from based_megatron.bench import kernels, neighbours
from based_megatron.bench.report import Case, Check, Row


def bench(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    """Exit code and rows of a quick run."""
    code = cli.main(["bench", *arguments, "--quick", "--output", str(tmp_path)])
    return code, json.loads((tmp_path / f"{arguments[0]}.json").read_text())["rows"]


def test_every_kernel_is_checked_and_timed(tmp_path, capsys):
    code, rows = bench(tmp_path, "kernels")
    assert code == 0, capsys.readouterr().err
    works = {row["work"] for row in rows}
    for op in ("taylor", "window", "add + RMSNorm", "SwiGLU", "cross entropy"):
        assert {f"{op} forward", f"{op} forward + backward"} <= works
    assert {"gated conv forward", "gated conv backward"} <= works
    checked = {name for row in rows for name in row["checks"]}
    assert {"o", "dq", "dk", "dv", "du, dgate", "dweight", "dresidual", "dupdate", "dx", "dlogits"} <= checked
    taylor = next(row for row in rows if row["work"] == "taylor forward")
    assert isinstance(taylor["peers"]["fla parallel_based"], str | dict) and "ms" in taylor["peers"]["SDPA flash"]
    assert all(row["target"] is None for row in rows), "tiny sizes have no targets"


@pytest.mark.parametrize(
    "case", ["SwiGLU", "add + RMSNorm", "cross entropy", "gated conv", "head dim 112", "sliding window"]
)
def test_the_triton_kernels_run_in_the_interpreter(tmp_path, case):
    """In fp32: the interpreter multiplies the bits of bf16 matrices, not their numbers."""
    code, rows = bench(tmp_path, "kernels", "--only", case, "--backend", "triton", "--precision", "fp32")
    assert code == 0 and rows
    assert all(check["error"] <= 1e-5 for row in rows for check in row["checks"].values())


def test_a_wrong_kernel_fails_and_is_named(tmp_path, monkeypatch, capsys):
    """Only in the backend under test: the reference stays what it is."""

    def doubled(x: torch.Tensor, *, backend: str = "reference") -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.silu(gate) * (2 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(neighbours, "swiglu", doubled)
    code, rows = bench(tmp_path, "kernels", "--only", "SwiGLU")
    assert code == 1 and not any(row["passed"] for row in rows)
    assert "failed: SwiGLU forward N12 W24; SwiGLU forward + backward" in capsys.readouterr().err


def test_one_case_that_raises_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def cases(_) -> list[Case]:
        return [Case("broken", lambda: 1 / 0), Case("good", lambda: Row("good", "", 1.0, checks={"o": Check(0, 1)}))]

    monkeypatch.setattr(kernels, "cases", cases)
    code, rows = bench(tmp_path, "kernels")
    assert code == 1 and [row["passed"] for row in rows] == [False, True]
    assert "failed: broken" in capsys.readouterr().err


def test_a_case_that_is_not_there_is_a_users_error(tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--only", "tailor", "--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--only 'tailor'" in error and "taylor attention" in error and error.count("\n") == 1


def test_the_report_can_be_repeated(tmp_path):
    bench(tmp_path, "kernels", "--only", "SwiGLU", "--seed", "3")
    text = (tmp_path / "kernels.md").read_text()
    for part in ("command: based bench kernels --only SwiGLU --seed 3 --quick", "torch 2.", "bfloat16", "CPU"):
        assert part in text


def train_on_a_rank(folder: str) -> tuple[int, dict]:
    code = cli.main(["bench", "train", "--quick", "--precision", "fp32", "--backend", "triton", "--output", folder])
    with open(f"{folder}/train.json") as file:
        return code, json.load(file)["rows"][0]


def test_a_training_step_agrees_with_the_reference_and_has_a_speed(tmp_path, worker_pool):
    ((code, row),) = worker_pool(1).run(train_on_a_rank, str(tmp_path))
    assert code == 0 and row["value"] > 0 and row["unit"] == "tok/s"
    assert len(row["checks"]) == 5 and all(check["error"] < 1e-4 for check in row["checks"].values())
    assert row["peers"]["Llama"] > 0
