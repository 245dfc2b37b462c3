"""`python -m benchmarks.sequence_parallel` at tiny sizes: it measures, models, writes, and names what is wrong."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from based_megatron.bench.keys import Passes
from based_megatron.parallel.sequence import states
from benchmarks.sequence_parallel.__main__ import main
from benchmarks.sequence_parallel.results import Layer, Part, Results, Sharing, Way, read_results


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_copy_during_kernels_copies_everything(channels):
    interference = pytest.importorskip("benchmarks.sequence_parallel.interference")
    source = torch.randn(1000)
    target = torch.zeros(1000)
    interference.copy_round[(channels,)](source, target, 2, len(source), BLOCK=128)
    assert torch.equal(source, target)


def run(*arguments: str) -> int:
    return main(["--quick", "--device", "cpu", *arguments])


def run_twice(folder: str) -> tuple[list[int], list[Results]]:
    """Measured and modelled; then modelled again from these measurements, with links that take no time."""
    with open(f"{folder}/links.json", "w") as file:
        instant = {f"{link}_us": 1e-6 for link in ("nvlink_send", "network_send", "all_to_all")}
        protocol = {"start_us": 1e-6, "nvlink_hop_us": 1e-6, "nvlink_hop_between_nodes_us": 1e-6}
        protocols = dict.fromkeys(("low_latency", "low_latency_128", "simple"), protocol)
        json.dump({"node_ranks": 4, "nvlink_gb_per_s": 1e9, "network_gb_per_s": 1e9, **instant, **protocols}, file)
    one = Path(folder, "one", "sequence-parallel.json")
    codes = [
        run("--output", f"{folder}/one"),
        run("--output", f"{folder}/two", "--measured", str(one), "--links", f"{folder}/links.json"),
    ]
    return codes, [read_results(one), read_results(Path(folder, "two", one.name))]


def test_parts_are_measured_and_many_ranks_modelled(tmp_path, worker_pool):
    pytest.importorskip("matplotlib")
    ((codes, (first, again)),) = worker_pool(1).run(run_twice, str(tmp_path))
    assert codes == [0, 0]
    measured = first.measured
    both = (Passes.FORWARD, Passes.BACKWARD)
    assert {(c.layer, c.passes) for c in measured.covers} == set(itertools.product(Layer, both))
    assert {p.part for p in measured.parts} == set(Part)
    steps = {(s.sharing, s.passes) for s in measured.steps if not s.as_graph}
    assert steps == set(itertools.product(Sharing, (Passes.FORWARD, Passes.BOTH)))
    state_checks = {c.way for c in measured.checks if c.layer is Layer.LINEAR_ATTENTION}
    assert state_checks == {Way.ALL_GATHER, Way.TWO_LEVEL, Way.CHAIN}
    assert len(measured.checks) == 11 and not first.failed()
    assert measured.lengths(as_graph=True) == measured.lengths() == [16, 32]
    scaled = first.modelled.steps
    assert len(scaled) == 6 and all(step.percent_as_graph is not None for step in scaled)
    assert all(step.efficiency_percent[Way.AUTO] > 0 for step in scaled)

    assert again.measured == measured
    faster = [step.efficiency_percent[Way.AUTO] for step in again.modelled.steps]
    slower = [step.efficiency_percent[Way.AUTO] for step in scaled]
    assert all(new >= old for new, old in zip(faster, slower, strict=True))
    assert again.facts["links"].endswith("links.json") and "one" in again.facts["measured by"]
    text = (tmp_path / "one" / "sequence-parallel.md").read_text()
    assert "## Measured: parts of a rank" in text and "## Modelled: efficiency" in text
    assert "<svg" in (tmp_path / "one" / "sequence-parallel.svg").read_text()


def test_a_wrong_exchange_fails_and_is_named(tmp_path, monkeypatch, capsys):
    right = states.start_gated_sum
    monkeypatch.setattr(states, "start_gated_sum", lambda *a, **k: right(*a, **k).then(lambda state: state * 1.1))
    assert run("--only", "checks", "--output", str(tmp_path)) == 1
    failed = capsys.readouterr().err
    assert "linear attention over slices, chain" in failed and "window over slices" not in failed


def test_a_case_that_raises_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """The model of a step without measurements."""
    assert run("--only", "one", "--output", str(tmp_path)) == 1
    assert "failed: one exchange" in capsys.readouterr().err
    found = read_results(tmp_path / "sequence-parallel.json")
    assert found.modelled.links and "not measured" in found.failures[0].error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--links", "{bad}"), "unknown key nvlink"),
        (("--links", "{none}"), "No such file"),
        (("--measured", "{bad}"), "is not the JSON of"),
        (("--only", "tailor"), "--only 'tailor'"),
    ],
)
def test_a_users_error_is_one_line(tmp_path, capsys, arguments, named):
    (tmp_path / "bad.yaml").write_text("nvlink: 1\n")
    places = {"bad": str(tmp_path / "bad.yaml"), "none": str(tmp_path / "none.yaml")}
    filled = [argument.format(**places) for argument in arguments]
    assert run(*filled, "--output", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
