"""`based bench` at tiny sizes: it checks, times, writes, and says by its exit code whether a check failed."""

import json

import pytest
import torch

from based_megatron import cli
from based_megatron.bench import kernels, norm_gate_loss
from based_megatron.bench.keys import Operation, Quantity
from based_megatron.bench.report import Case, Check, Row


def bench(tmp_path, *arguments: str) -> tuple[int, dict]:
    """Exit code and report of a quick run."""
    code = cli.main(["bench", *arguments, "--quick", "--output", str(tmp_path)])
    return code, json.loads((tmp_path / f"{arguments[0]}.json").read_text())


def test_every_kernel_is_checked_and_timed(tmp_path, capsys):
    code, report = bench(tmp_path, "kernels")
    assert code == 0, capsys.readouterr().err
    rows = report["rows"]
    measured = {(row["operation"], row.get("passes")) for row in rows}
    for operation in (
        "taylor_attention",
        "square_attention",
        "sliding_window",
        "add_rms_norm",
        "swiglu",
        "cross_entropy",
    ):
        assert {(operation, "forward"), (operation, "forward_backward")} <= measured
    assert {("gated_conv", "forward"), ("gated_conv", "backward")} <= measured
    checked = {name for row in rows for name in row.get("checks", {})}
    assert {"o", "dq", "dk", "dv", "du, dgate", "dweight", "dresidual", "dupdate", "dx", "dlogits"} <= checked
    taylor = next(row for row in rows if row["operation"] == "taylor_attention")
    assert taylor["sizes"] == {"batch": 2, "tokens": 48, "heads": 2, "feature_dim": 8, "head_dim": 16}
    assert taylor["baselines"]["sdpa_flash"].keys() == {"ms", "method"}
    assert isinstance(taylor["baselines"]["fla_parallel_based"], str | dict)
    assert not any("target" in row for row in rows), "tiny sizes have no targets"


@pytest.mark.parametrize(
    "case", ["SwiGLU", "add + RMSNorm", "cross entropy", "gated conv", "head dim 112", "sliding window"]
)
def test_the_triton_kernels_run_in_the_interpreter(tmp_path, case):
    """In fp32, where errors are those of the formula and not of rounding."""
    code, report = bench(tmp_path, "kernels", "--only", case, "--backend", "triton", "--precision", "fp32")
    assert code == 0 and report["rows"]
    assert all(check["error"] <= 1e-5 for row in report["rows"] for check in row["checks"].values())


def test_a_wrong_kernel_fails_and_is_named(tmp_path, monkeypatch, capsys):
    """Wrong in the backend under test only: the reference stays what it is."""

    def doubled(x: torch.Tensor, *, backend: str = "reference") -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.silu(gate) * (2 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(norm_gate_loss, "swiglu", doubled)
    code, report = bench(tmp_path, "kernels", "--only", "SwiGLU")
    checks = [check for row in report["rows"] for check in row["checks"].values()]
    assert code == 1 and len(checks) == 2 and all(check["error"] > check["limit"] for check in checks)
    assert "failed: SwiGLU, forward N12 W24; SwiGLU, forward + backward" in capsys.readouterr().err


def test_one_case_that_raises_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    good = Row(Operation.COPY, 1.0, Quantity.GIGABYTES_PER_SECOND, checks={"o": Check(0, 1)})

    def cases(_) -> list[Case]:
        return [Case("broken", lambda: 1 / 0), Case("good", lambda: good)]

    monkeypatch.setattr(kernels, "cases", cases)
    code, report = bench(tmp_path, "kernels")
    assert code == 1 and [row["operation"] for row in report["rows"]] == ["copy"]
    assert report["failures"] == [{"case": "broken", "error": "ZeroDivisionError: division by zero"}]
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
    assert code == 0 and row["value"] > 0 and row["quantity"] == "tokens_per_second"
    assert len(row["checks"]) == 5 and all(check["error"] < 1e-4 for check in row["checks"].values())
    assert row["baselines"]["llama"] > 0
