"""Measured values of several runs, and the committed results: pages and plots are what their JSON says."""

import json
import math
from pathlib import Path

import pytest

from based_megatron.bench.keys import Method, Passes
from based_megatron.bench.report import plain
from based_megatron.config.load import load_config
from based_megatron.errors import ConfigError
from benchmarks import plot_taylor, render
from benchmarks.sequence_parallel.__main__ import earlier_measured
from benchmarks.sequence_parallel.links import Links
from benchmarks.sequence_parallel.modelled import exposed_exchanges, link_costs, scaled_steps
from benchmarks.sequence_parallel.plot import draw
from benchmarks.sequence_parallel.rank_steps import extrapolated
from benchmarks.sequence_parallel.results import (
    CoveringKernel,
    Layer,
    Measured,
    Modelled,
    Part,
    PartTime,
    Results,
    Sharing,
    Slowdown,
    StepTime,
    read_results,
)
from benchmarks.sequence_parallel.tables import to_markdown
from benchmarks.sequence_parallel.traffic import LayerTraffic

RESULTS = Path(render.__file__).parent / "results"
SEQUENCE_PARALLEL = RESULTS / "h100-sequence-parallel.json"


def part(part: Part, ms: float) -> PartTime:
    return PartTime(Layer.LINEAR_ATTENTION, part, 16, ms, Method.GRAPH)


def results(device: str, *parts: PartTime) -> Results:
    return Results({"device": device, "command": "x"}, Measured(parts=parts), Modelled())


def test_later_measurements_replace_earlier_ones_of_the_same_device():
    one = results("A", part(Part.DQ, 1.0), part(Part.DK_DV, 2.0))
    two, other = results("A", part(Part.DQ, 3.0)), results("B", part(Part.DQ, 4.0))
    joined = earlier_measured([one, two])
    assert {p.part: p.ms for p in joined.parts} == {Part.DQ: 3.0, Part.DK_DV: 2.0}
    with pytest.raises(ConfigError, match="different devices, A, B"):
        earlier_measured([one, other])


def test_the_slowdown_during_a_copy_is_that_at_the_rate_of_the_link():
    rates = [(4, 1.1, 190.0), (8, 1.2, 370.0), (16, 1.3, 680.0)]
    rows = [Slowdown(CoveringKernel.DQ, 16384, channels, ratio, rate, 1.0) for channels, ratio, rate in rates]
    measured = Measured(slowdowns=rows)
    assert measured.slowdown(CoveringKernel.DQ, 350.0) == 1.2 and measured.slowdown(CoveringKernel.DQ, 50.0) == 1.1
    assert measured.slowdown(CoveringKernel.QUERY_PROJECTION, 350.0) == 1.0


def test_what_was_not_measured_is_named():
    with pytest.raises(KeyError, match="cover of window, backward, L16: not measured"):
        Measured().cover_ms(Layer.SLIDING_WINDOW, Passes.BACKWARD, 16)
    with pytest.raises(KeyError, match="number of parameters"):
        Measured().parameters()


def test_a_length_that_does_not_fit_is_in_proportion_to_the_longest_one():
    found = [
        StepTime(Sharing.SLICE, Passes.BOTH, length, ms, tokens_per_second=1.0, recomputed=True)
        for length, ms in [(8, 3.0), (16, 5.0)]
    ]
    (step,) = extrapolated(found, 64)
    assert (step.length_tokens, step.ms, step.extrapolated_from_tokens) == (64, 20.0, 16)
    assert step.recomputed and step.tokens_per_second is None


def test_results_survive_their_file(tmp_path):
    text = SEQUENCE_PARALLEL.read_text()
    assert read_results(SEQUENCE_PARALLEL).to_json() == text
    (tmp_path / "other.json").write_text(json.dumps({"facts": {}, "rows": []}))
    for wrong in (tmp_path / "other.json", tmp_path / "missing.json", RESULTS / "h200-train.json"):
        with pytest.raises(ConfigError) as error:
            read_results(wrong)
        assert str(wrong) in str(error.value) and "\n" not in str(error.value)


def test_the_committed_model_follows_from_the_committed_measurements():
    """Everything that was modelled for 8 ranks, to the last digit."""
    committed = read_results(SEQUENCE_PARALLEL)
    measured, links = committed.measured, Links()
    traffic = LayerTraffic.of(load_config("based-1b").model)
    again = Modelled(
        link_costs(links, traffic, 16384, [8]),
        exposed_exchanges(links, traffic, measured, measured.lengths(), [8]),
        scaled_steps(links, traffic, measured, [8], 0, (1 << 17, math.inf)),
    )
    rows = {
        name: [row for row in getattr(committed.modelled, name) if row.ranks == 8]
        for name in ("links", "exchanges", "steps")
    }
    assert all(rows.values()) and plain(again) == plain(Modelled(**rows))


def test_the_committed_page_and_plot_are_what_the_results_say(tmp_path):
    committed = read_results(SEQUENCE_PARALLEL)
    assert SEQUENCE_PARALLEL.with_suffix(".md").read_text() == to_markdown(committed, SEQUENCE_PARALLEL.stem)
    pytest.importorskip("matplotlib")
    draw(committed, tmp_path / "plot.svg")
    assert circles(tmp_path / "plot.svg") == circles(SEQUENCE_PARALLEL.with_suffix(".svg"))


def test_the_committed_plot_of_taylor_attention_is_what_the_results_say(tmp_path):
    pytest.importorskip("matplotlib")
    plot_taylor.main(RESULTS / "h200-taylor.json", tmp_path / "plot.svg")
    assert circles(tmp_path / "plot.svg") == circles(RESULTS / "h200-taylor.svg")


def circles(path: Path) -> list[str]:
    """Places of all points: other versions of matplotlib may draw axes in other ways."""
    places = [line.strip() for line in path.read_text().splitlines() if "<use" in line and "fill" in line]
    assert places
    return places


@pytest.mark.parametrize("name", ["h200-kernels", "h200-taylor", "h200-decode", "h200-train", "h100-prefill"])
def test_the_committed_tables_are_what_their_results_say(name):
    path = RESULTS / f"{name}.json"
    assert path.with_suffix(".md").read_text() == render.rendered(path)
    assert render.read_report(path).to_json() == path.read_text()
