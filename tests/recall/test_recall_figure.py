"""Files of the study, made from results that were written by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from based_megatron.bench.report import plain
from based_megatron.recall.figure import draw, read_study, to_markdown, write
from based_megatron.recall.presets import PRESETS
from based_megatron.recall.sweep import RESULTS, study_key
from based_megatron.run_folder.json_lines import append_line

FIGURE = PRESETS["figure"]
RESULTS_FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
SEGMENTS = [segment.name for segment in FIGURE.task.test]


def line(point: str, nbytes: int, accuracy: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    rates = [
        {"rate": 0.001, "epochs": 2, "loss": 3.0, "accuracy": None},
        {"rate": 0.01, "epochs": 12, "loss": 1.0, "accuracy": {name: accuracy for name in SEGMENTS}},
        {"rate": 0.03, "epochs": 12, "loss": 1.0, "accuracy": {name: accuracy / 2 for name in SEGMENTS}},
    ]
    return {
        "key": f"{point} {seed}", "study": study_key(FIGURE), "system": point.partition("-")[0], "point": point, "seed": seed,
        "state_bytes": {"recurrent": nbytes - 1536, "published": nbytes, "product": None if "attention" in point else nbytes + 7},
        "parameters": 10, "rates": rates, "seconds": 2.0, "cpu_seconds": 1.0, "device": "CPU", **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for values in (
        line("mine-d64", 12_000, 0.75),
        line("based-d128-f16", 80_484, 0.96),
        line("based-d128-f16", 80_484, 0.98, seed=1),
        line("based-d64-f16", 40_548, 0.9),
        line("attention-d64", 525_056, 1.0),
        line("window-d128-w64", 67_072, 0.5, study="another task"),
        {
            "key": "hyena-d64",
            "study": study_key(FIGURE),
            "system": "hyena",
            "point": "hyena-d64",
            "failed": "no memory",
        },
    ):
        append_line(tmp_path / RESULTS, values)
    return tmp_path


def test_points_are_the_best_rates_and_means_over_seeds(folder):
    study = read_study(folder, "figure", FIGURE, "based recall")
    found = {point.point: (point.mean_accuracy, point.published, list(point.rates)) for point in study.points}
    assert found == {
        "based-d64-f16": (0.9, 0.912, [0.01]),
        "based-d128-f16": (pytest.approx(0.97), 0.985, [0.01, 0.01]),
        "attention-d64": (1.0, None, [0.01]),
        "mine-d64": (0.75, None, [0.01]),
    }


def test_the_table_has_bytes_in_three_ways_and_the_published_accuracy(folder):
    page = to_markdown(read_study(folder, "figure", FIGURE, "based recall --x"))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| Based")]
    assert rows[0][:6] == ["Based", "based-d64-f16", "40,548", "39,012", "40,555", "**0.900**"]
    assert rows[1][5] == "**0.970** ± 0.010" and rows[1][-2:] == ["0.985", "0.01 0.01"]
    assert "| attention | attention-d64 | 525,056 | 523,520 | grows |" in page
    assert "window" not in page and "hyena" not in page and "based recall --x" in page


def test_files_are_written_and_every_point_is_drawn(folder):
    pytest.importorskip("matplotlib")
    names = [path.name for path in write(folder, "figure", FIGURE, "based recall")]
    assert names == ["recall.json", "recall.md", "recall.svg"]
    saved = json.loads((folder / "recall.json").read_text())
    assert len(saved["points"]) == 4 and len(saved["runs"]) == 5 and saved["facts"]["preset"] == "figure"
    words = (folder / "recall.svg").read_text()
    for word in ("Based", "attention", "mine", "bytes of state", "pairs"):
        assert word in words


def test_the_picture_is_the_same_in_every_run(folder):
    pytest.importorskip("matplotlib")
    study = read_study(folder, "figure", FIGURE, "based recall")
    pictures = []
    for name in ("one.svg", "two.svg"):
        draw(study, folder / name)
        pictures.append((folder / name).read_text())
    assert pictures[0] == pictures[1]


def test_a_folder_without_results_has_no_page(tmp_path):
    assert write(tmp_path, "figure", FIGURE, "based recall") == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["tiny", "figure"])
def test_the_committed_page_and_picture_are_what_the_results_say(preset, tmp_path):
    saved = json.loads((RESULTS_FOLDER / f"recall-{preset}.json").read_text())
    for run in saved["runs"]:
        append_line(tmp_path / RESULTS, run)
    study = read_study(tmp_path, preset, PRESETS[preset], saved["facts"]["command"])
    study = dataclasses.replace(study, facts=saved["facts"])
    assert json.loads(json.dumps(plain(study))) == saved
    assert to_markdown(study) == (RESULTS_FOLDER / f"recall-{preset}.md").read_text()
    pytest.importorskip("matplotlib")
    draw(study, tmp_path / "recall.svg")
    assert circles(tmp_path / "recall.svg") == circles(RESULTS_FOLDER / f"recall-{preset}.svg")


def circles(path: Path) -> list[str]:
    """Places of all points: other versions of matplotlib may draw axes in other ways."""
    places = [line.strip() for line in path.read_text().splitlines() if "<use" in line and "fill" in line]
    assert places
    return places


def test_the_tiny_study_has_the_published_order():
    """Attention >= Gated DeltaNet, DeltaNet >= Based > Mamba-2 > a window > RetNet > Hyena, at their largest states."""
    saved = json.loads((RESULTS_FOLDER / "recall-tiny.json").read_text())
    largest = {point["system"]: sum(point["seeds"]) for point in saved["points"]}
    order = ["deltanet", "based", "mamba2", "window", "retnet", "hyena"]
    accuracies = [largest[system] for system in order]
    assert accuracies == sorted(accuracies, reverse=True) and largest["attention"] > 0.98 < largest["gated_deltanet"]
