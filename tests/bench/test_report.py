"""What a row says, and the files it is written to."""

import json
import math
import sys

import pytest
import torch

from based_megatron.bench.report import Case, Check, Row, Target, relative_error, summary, to_markdown, write_report
from based_megatron.bench.timing import Timing

FACTS = {"device": "a CPU", "dtype": "float32"}
ROWS = [
    Row(
        "taylor forward",
        "B8 T2048",
        0.0712,
        target=Target("at most", 0.075),
        floor=0.02,
        peers={"flash": Timing(0.237, "graph"), "eager": Timing(1234.0, "events"), "fla": "not installed"},
        checks={"o": Check(1.5e-3, 3e-3)},
        rates={"GB/s": 3100.0},
    ),
    Row("training step", "B8", 54000.0, "tok/s", target=Target("at least", 60000), peers={"Llama": 54517.0}),
    Row("window", "B1", 1.0, checks={"dq": Check(math.nan, 1e-3)}),
]


@pytest.mark.parametrize(("error", "passed"), [(1e-3, True), (1.1e-3, False), (math.nan, False), (math.inf, False)])
def test_a_check_passes_up_to_its_limit_and_never_with_nan(error, passed):
    assert Check(error, 1e-3).passed == passed
    assert Row("x", "", 1.0, checks={"o": Check(0, 1), "dq": Check(error, 1e-3)}).passed == passed


def test_targets_have_a_direction():
    assert Target("at most", 2).met(2) and not Target("at most", 2).met(2.1)
    assert Target("at least", 2).met(2) and not Target("at least", 2).met(1.9)


def test_a_missed_target_is_no_failure():
    assert ROWS[1].passed


def test_a_case_that_raises_is_a_failed_row_of_its_name(capsys):
    def run():
        raise RuntimeError("out of\nregisters")

    (row,) = Case("gated conv", run).rows()
    assert row.work == "gated conv" and not row.passed and row.failure == "RuntimeError: out of registers"
    assert "Traceback" in capsys.readouterr().err


def test_relative_error_is_that_of_the_whole_tensor():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))


def test_the_table():
    text = to_markdown([*ROWS, Row.failed("conv", ValueError("a | b"))], FACTS, "kernels")
    taylor, training, window, conv = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for part in ("0.0712 ms", "<= 0.075 met", "flash: 0.237", "eager: 1,234*", "fla: not installed"):
        assert part in taylor
    assert "1.5e-03 (3e-03)" in taylor and "FAILED" not in taylor
    assert "54,000 tok/s" in training and ">= 60,000 **missed**" in training and "Llama: 54,517" in training
    assert "**FAILED**" in window and "nan" in window
    assert "**FAILED**" in conv and "ValueError: a \\| b" in conv
    assert "device: a CPU" in text


def test_a_line_for_the_console():
    assert "FAILED" in summary(ROWS[2]) and "FAILED" not in summary(ROWS[0]) and "fla not installed" in summary(ROWS[0])


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    written = write_report(ROWS, FACTS, tmp_path / "new" / "folder", "kernels")
    assert [path.name for path in written] == ["kernels.md", "kernels.json", "kernels.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    data = json.loads(written[1].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["facts"] == FACTS
    first, second, third = data["rows"]
    assert (
        first["value"] == 0.0712 and first["target_met"] and first["peers"]["flash"] == {"ms": 0.237, "method": "graph"}
    )
    assert not second["target_met"] and second["passed"]
    assert third["checks"]["dq"]["error"] is None and not third["passed"]


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in write_report(ROWS, FACTS, tmp_path, "x")] == ["x.md", "x.json"]


def test_a_run_of_failures_alone_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert len(write_report([Row.failed("x", ValueError("no"))], FACTS, tmp_path, "x")) == 3
