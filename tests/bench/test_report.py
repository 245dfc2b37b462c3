"""What a row says, and the files it is written to."""

import json
import math
import sys

import pytest
import torch

from based_megatron.bench.bars import draw_bars
from based_megatron.bench.keys import Baseline, Method, Operation, Passes, Quantity, Sizes
from based_megatron.bench.report import Case, Check, Failure, Report, Row, Target, relative_error
from based_megatron.bench.run import draw, write
from based_megatron.bench.table import summary, to_markdown
from based_megatron.bench.timing import Timing

FACTS = {"device": "a CPU", "dtype": "float32"}
ROWS = [
    Row(
        Operation.TAYLOR_ATTENTION,
        0.0712,
        passes=Passes.FORWARD,
        sizes=Sizes(batch=8, tokens=2048),
        method=Method.GRAPH,
        target=Target("at most", 0.075),
        floor=0.02,
        baselines={
            Baseline.SDPA_FLASH: Timing(0.237, Method.GRAPH),
            Baseline.PYTORCH: Timing(1234.0, Method.EVENTS),
            Baseline.FLA_PARALLEL: "not installed",
        },
        checks={"o": Check(1.5e-3, 3e-3)},
        rates={Quantity.GIGABYTES_PER_SECOND: 3100.0},
    ),
    Row(
        Operation.TRAINING_STEP,
        54000.0,
        Quantity.TOKENS_PER_SECOND,
        model="based-1b",
        target=Target("at least", 60000),
        baselines={Baseline.LLAMA: 54517.0},
    ),
    Row(Operation.SLIDING_WINDOW, 1.0, method=Method.EVENTS, checks={"dq": Check(math.nan, 1e-3)}),
]
REPORT = Report("kernels", FACTS, ROWS, [Failure.of("gated conv", ValueError("a |\n b"))])


@pytest.mark.parametrize(("error", "passed"), [(1e-3, True), (1.1e-3, False), (math.nan, False), (math.inf, False)])
def test_a_check_passes_up_to_its_limit_and_never_with_nan(error, passed):
    assert Check(error, 1e-3).passed == passed
    assert Row(Operation.COPY, 1.0, checks={"o": Check(0, 1), "dq": Check(error, 1e-3)}).passed == passed


def test_targets_have_a_direction():
    assert Target("at most", 2).met(2) and not Target("at most", 2).met(2.1)
    assert Target("at least", 2).met(2) and not Target("at least", 2).met(1.9)


def test_a_missed_target_is_no_failure():
    assert ROWS[1].passed


def test_a_case_that_raises_is_a_failure_of_its_name(capsys):
    def run():
        raise RuntimeError("out of\nregisters")

    assert Case("gated conv", run).outcome() == Failure("gated conv", "RuntimeError: out of registers")
    assert "Traceback" in capsys.readouterr().err


def test_relative_error_is_that_of_the_whole_tensor():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))


def test_the_table_shows_times_targets_baselines_and_errors():
    text = to_markdown(REPORT)
    taylor, training, window, conv = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for part in ("Taylor attention, forward | B8 T2048 | 0.0712 ms |", "<= 0.075 met", "SDPA flash: 0.237<br>"):
        assert part in taylor
    assert "PyTorch: 1,234*" in taylor and "fla parallel_based: not installed" in taylor
    assert "1.5e-03 (3e-03)" in taylor and "FAILED" not in taylor
    assert "| based-1b | 54,000 tok/s | >= 60,000 **missed**" in training and "Llama: 54,517" in training
    assert "| 1* ms |" in window and "**FAILED**" in window and "nan" in window
    assert "**FAILED**" in conv and "ValueError: a \\| b" in conv
    assert "device: a CPU" in text


def test_a_line_for_the_console():
    assert "FAILED" in summary(ROWS[2]) and "FAILED" not in summary(ROWS[0])
    assert "fla parallel_based not installed" in summary(ROWS[0])


def test_a_run_writes_a_table_typed_numbers_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    written = [*write(REPORT, tmp_path / "new" / "folder"), *draw(REPORT, tmp_path / "new" / "folder")]
    assert [path.name for path in written] == ["kernels.md", "kernels.json", "kernels.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    data = json.loads(written[1].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["facts"] == FACTS and data["failures"] == [{"case": "gated conv", "error": "ValueError: a | b"}]
    first, second, third = data["rows"]
    assert first["value"] == 0.0712 and first["sizes"] == {"batch": 8, "tokens": 2048}
    assert first["baselines"]["sdpa_flash"] == {"ms": 0.237, "method": "graph"}
    assert first["rates"] == {"gigabytes_per_second": 3100.0}
    assert second["quantity"] == "tokens_per_second" and "checks" not in second
    assert third["checks"]["dq"]["error"] == "nan"


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(REPORT, tmp_path) == []


def test_a_run_of_failures_alone_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_bars(Report("x", FACTS, (), REPORT.failures), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
