"""`based bench sequence-parallel`: formulas against hand-computed values, the simulation against closed forms, the command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from based_megatron import cli
from based_megatron.bench.links import Links, read_links
from based_megatron.bench.rank_model import Measured, state_exchange_us
from based_megatron.bench.report import Row, write_report
from based_megatron.bench.scaling import Segment, chain, collective, gradients_exposed_ms, neighbours, simulate
from based_megatron.bench.sequence_parallel import earlier_rows
from based_megatron.bench.traffic import LayerTraffic
from based_megatron.config.load import load_config
from based_megatron.errors import ConfigError
from based_megatron.parallel.sequence import states

LINKS = Links()
BASED_1B = LayerTraffic.of(load_config("based-1b").model)
STATE_BYTES = 153 * 113 * 16 * 4


# Links: microseconds by hand from NCCL's latencies, for a state of 1.107 MB.


@pytest.mark.parametrize(
    ("ranks", "us"), [(1, 0), (2, 15), (4, 28), (8, 51), (16, 96), (32, 186), (64, 365), (128, 723), (512, 2873)]
)
def test_an_all_gather_of_packed_states(ranks, us):
    assert round(LINKS.all_gather_us(ranks, STATE_BYTES)) == us


@pytest.mark.parametrize(("ranks", "us"), [(2, 17), (4, 36), (8, 70), (16, 137), (64, 535), (512, 4250)])
def test_an_all_gather_of_all_rows(ranks, us):
    assert round(LINKS.all_gather_us(ranks, BASED_1B.unpacked_state_bytes)) == us


@pytest.mark.parametrize(("ranks", "us"), [(8, 29), (16, 44), (32, 59), (64, 74), (128, 89), (512, 119)])
def test_two_levels_with_recursive_doubling(ranks, us):
    """3 us of the GPUs' own work were counted in."""
    assert round(LINKS.two_level_us(ranks, STATE_BYTES, doubling=True) + 3) == us


def test_two_levels_as_they_are_gather_on_the_rails():
    """At two nodes the 128-byte protocol is the fastest: 14 + 4 us, and an eighth of the state at 0.92 x 45 GB/s."""
    inside = 2 * (10 + 7 / 8 * STATE_BYTES / 350e3)
    assert LINKS.two_level_us(16, STATE_BYTES) == pytest.approx(inside + 14 + 4 + STATE_BYTES / 8 / (0.92 * 45e3))
    assert state_exchange_us(LINKS, BASED_1B, 16, "auto") == LINKS.two_level_us(16, STATE_BYTES)
    assert state_exchange_us(LINKS, BASED_1B, 8, "auto") == LINKS.all_gather_us(8, STATE_BYTES)


def test_a_chain_crosses_each_link_once():
    nvlink, network = 8 + STATE_BYTES / 350e3, 12 + STATE_BYTES / 45e3
    assert LINKS.chain_us(1, STATE_BYTES) == 0
    assert LINKS.chain_us(8, STATE_BYTES) == pytest.approx(7 * nvlink)
    assert LINKS.chain_us(24, STATE_BYTES) == pytest.approx(21 * nvlink + 2 * network)
    assert LINKS.hops_us(9, STATE_BYTES) == pytest.approx([nvlink] * 7 + [network])


def test_bytes_of_a_layer():
    """Based-1.3B, a million tokens over 64 ranks of 8-rank nodes."""
    P, L = 64, 16384
    assert BASED_1B.state_bytes == STATE_BYTES
    assert BASED_1B.all_gather_bytes(P, BASED_1B.state_bytes) == pytest.approx(69.7e6, rel=1e-3)
    assert BASED_1B.all_gather_bytes(P, BASED_1B.unpacked_state_bytes) == pytest.approx(124e6, rel=5e-3)
    assert BASED_1B.two_level_bytes(P, 8) == pytest.approx((1.936e6, 0.968e6), rel=1e-3)
    assert BASED_1B.linear_all_to_all_bytes(L) == pytest.approx(134e6, rel=5e-3)
    assert BASED_1B.window_all_to_all_bytes(L) == pytest.approx(235e6, rel=5e-3)
    assert BASED_1B.ring_attention_bytes(P, L) == pytest.approx(7.40e9, rel=1e-3)
    assert (BASED_1B.window_halo_bytes, BASED_1B.conv_halo_bytes) == (917504, 14336)
    assert [BASED_1B.letters.count(letter) for letter in "LSc"] == [7, 7, 22]


def test_gradients_of_many_ranks_hide_behind_long_slices():
    """Based-1.3B at 331.6 ms for 16384 tokens: 7.7 ms stay exposed at 512 ranks, 24.4 ms with an eighth of the tokens."""
    parameters, ms = 1.349e9, 331.6
    assert gradients_exposed_ms(LINKS, 512, parameters, ms / 3, 2 * ms / 3) == pytest.approx(7.7, abs=0.05)
    assert gradients_exposed_ms(LINKS, 512, parameters, ms / 24, ms / 12) == pytest.approx(24.4, abs=0.1)
    assert gradients_exposed_ms(LINKS, 1, parameters, 1, 1) == 0


# The simulation.


@pytest.mark.parametrize("link_ms", [0.5, 2.0, 7.0])
def test_without_jitter_a_step_is_its_computation_and_what_covers_do_not_hide(link_ms):
    segments = [Segment(3.0, 2.0, 0.25, collective(link_ms))] * 4
    assert simulate(segments, segments, 16) == pytest.approx(8 * (3 + max(2, link_ms) + 0.25))


def test_a_chain_pays_its_skew_once_a_pass_and_not_once_a_layer():
    """A collective that takes as long pays it in every layer."""
    layers, ranks, hop_ms = 5, 8, 0.7
    chained = [Segment(3.0, 0.0, 0.0, chain([hop_ms] * (ranks - 1)))] * layers
    together = [Segment(3.0, 0.0, 0.0, collective(hop_ms * (ranks - 1)))] * layers
    assert simulate(chained, chained, ranks) == pytest.approx(2 * (layers * 3 + (ranks - 1) * hop_ms))
    assert simulate(together, together, ranks) == pytest.approx(2 * layers * (3 + (ranks - 1) * hop_ms))


def test_a_chain_is_its_recursion():
    """arrival(r + 1) = max(arrival(r), start(r)) + hop(r), written out."""
    start = np.array([3.0, 0.0, 9.0, 1.0])
    hops = [1.0, 2.0, 4.0]
    arrivals = [-np.inf]
    for rank, hop in enumerate(hops):
        arrivals.append(max(arrivals[-1], start[rank]) + hop)
    assert chain(hops)(start).tolist() == arrivals == [-np.inf, 4, 6, 13]


def test_a_halo_waits_for_one_neighbour():
    assert neighbours([1.0, 2.0])(np.array([5.0, 0.0, 0.0])).tolist() == [-np.inf, 6, 2]
    segments = [Segment(1.0, 2.0, 0.0, neighbours([2.5] * 3))] * 3
    assert simulate(segments, segments, 4) == pytest.approx(6 * 3.5)


def test_backward_runs_from_right_to_left():
    """Only the last rank waits forward; it is the first of the backward pass, which waits for nothing."""
    forward = [Segment(1.0, 0.0, 0.0, chain([0.0, 10.0]))]
    backward = [Segment(1.0, 0.0, 0.0, chain([4.0, 0.0]))]
    assert simulate(forward, backward, 3) == pytest.approx(1 + 10 + 1 + 4)


def test_jitter_is_seeded_and_only_slows():
    segments = [Segment(3.0, 2.0, 0.5, collective(1.0))] * 6
    exact = simulate(segments, segments, 32)
    drawn = [simulate(segments, segments, 32, jitter=0.02, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and min(drawn) > exact


def test_slower_links_and_more_jitter_never_make_a_step_faster():
    def step(link_ms: float, jitter: float) -> float:
        segments = [Segment(3.0, 1.0, 0.0, collective(link_ms)), Segment(1.0, 1.0, 0.0, neighbours([link_ms] * 15))]
        return simulate(segments, segments, 16, jitter)

    for jitter in (0.0, 0.05):
        times = [step(link_ms, jitter) for link_ms in (0.0, 0.5, 1.0, 2.0, 4.0)]
        assert times == sorted(times) and times[-1] > times[0]
    assert step(1.0, 0.0) < step(1.0, 0.01) < step(1.0, 0.1)


# Links from a file.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("links.yaml", "nvlink_gb_per_s: 400\nsimple:\n  start_us: 5\nnode_ranks: 4\n"),
        ("links.json", '{"nvlink_gb_per_s": 400, "simple": {"start_us": 5}, "node_ranks": 4}'),
    ],
)
def test_a_file_replaces_some_numbers(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    links = read_links(tmp_path / name)
    assert (links.nvlink_gb_per_s, links.simple.start_us, links.node_ranks) == (400.0, 5.0, 4)
    assert (links.network_gb_per_s, links.simple.network_hop_us) == (45.0, 14.0)
    assert read_links(None) == Links()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nvlink_gbps: 1", "unknown key nvlink_gbps"),
        ("simple: {base_us: 1}", "unknown key simple.base_us"),
        ("simple: 3", "simple is 3"),
        ("network_gb_per_s: fast", "network_gb_per_s is 'fast'"),
        ("network_gb_per_s: 0", "network_gb_per_s is 0"),
        ("network_gb_per_s: true", "network_gb_per_s is True"),
        ("node_ranks: 2.5", "node_ranks is 2.5"),
        ("- 1", "the file is [1]"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, text, named):
    path = tmp_path / "links.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_links(path)
    assert named in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_slowdown_beside_a_copy_is_that_at_the_rate_of_the_link():
    rows = [
        Row("slowdown of dq beside a copy", f"L16384 C{channels}", value, "x", rates={"GB/s copied": rate})
        for channels, value, rate in [(4, 1.1, 190.0), (8, 1.2, 370.0), (16, 1.3, 680.0)]
    ]
    assert Measured(rows).slowdown("dq", 350.0) == 1.2 and Measured(rows).slowdown("dq", 50.0) == 1.1
    assert Measured(rows).slowdown("query projection", 350.0) == 1.0
    with pytest.raises(KeyError, match="not measured"):
        Measured(rows).at("dq", "L2048")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_copy_beside_kernels_copies_everything(channels):
    interference = pytest.importorskip("based_megatron.bench.interference")
    source = torch.randn(1000)
    target = torch.zeros(1000)
    interference.copy_round[(channels,)](source, target, 2, len(source), BLOCK=128)
    assert torch.equal(source, target)


# The command.


def run(*arguments: str) -> int:
    return cli.main(["bench", "sequence-parallel", "--quick", "--device", "cpu", *arguments])


def run_twice(folder: str) -> tuple[list[int], list[dict]]:
    """Measured and modelled; then modelled again from these measurements, with links that take no time."""
    with open(f"{folder}/links.json", "w") as file:
        instant = {f"{link}_us": 1e-6 for link in ("nvlink_send", "network_send", "all_to_all")}
        protocols = {name: {"start_us": 1e-6, "nvlink_hop_us": 1e-6, "nvlink_hop_between_nodes_us": 1e-6} for name in (
            "low_latency", "low_latency_128", "simple"
        )}  # fmt: skip
        json.dump({"node_ranks": 4, "nvlink_gb_per_s": 1e9, "network_gb_per_s": 1e9, **instant, **protocols}, file)
    codes = [
        run("--output", f"{folder}/one"),
        run("--output", f"{folder}/two", "--measured", f"{folder}/one/sequence-parallel.json", "--links",
            f"{folder}/links.json"),
    ]  # fmt: skip
    reports = []
    for name in ("one", "two"):
        with open(f"{folder}/{name}/sequence-parallel.json") as file:
            reports.append(json.load(file))
    return codes, reports


def test_parts_are_measured_and_many_ranks_modelled(tmp_path, worker_pool):
    pytest.importorskip("matplotlib")
    ((codes, reports),) = worker_pool(1).run(run_twice, str(tmp_path))
    assert codes == [0, 0]
    first, again = (report["rows"] for report in reports)
    measured = [row for row in first if row["source"] == "measured"]
    works = {row["work"] for row in measured}
    for kind, way in itertools.product(("state", "window", "conv"), ("forward", "backward")):
        assert f"{kind}: cover {way}" in works
    assert {"state: dq", "state: segment state", "window: backward", "conv: forward"} <= works
    assert {"step: whole sequence, forward + backward", "step: slice, forward + backward"} <= works
    assert {f"linear attention over slices, {a}" for a in ("all_gather", "two_level", "chain")} <= works
    checked = [row for row in measured if row["checks"]]
    assert len(checked) == 11 and all(row["passed"] for row in checked)
    steps = [row for row in first if row["work"] == "training step, efficiency"]
    assert "step: slice, forward + backward as a CUDA graph" in works
    assert all("% as CUDA graphs" in row["rates"] for row in steps)
    assert len(steps) == 6 and all(row["source"] == "modelled" and row["value"] > 0 for row in steps)

    assert [row["value"] for row in again if row["source"] == "measured"] == [row["value"] for row in measured]
    faster = [row for row in again if row["work"] == "training step, efficiency"]
    assert all(new["value"] >= old["value"] for new, old in zip(faster, steps, strict=True))
    facts = reports[1]["facts"]
    assert facts["links"].endswith("links.json") and "one" in facts["measured by"]
    text = (tmp_path / "one" / "sequence-parallel.md").read_text()
    assert "| measured |" in text and "| modelled |" in text
    assert "<svg" in (tmp_path / "one" / "sequence-parallel.svg").read_text()


def test_later_measurements_replace_earlier_ones_of_the_same_device(tmp_path):
    def write(name: str, device: str, **values: float) -> Path:
        rows = [Row(work, "L16", value) for work, value in values.items()]
        _, data = write_report(rows, {"device": device, "command": name}, tmp_path, name, plot=False)
        return data

    one, two, other = write("1", "A", dq=1.0, dk=2.0), write("2", "A", dq=3.0), write("3", "B", dq=4.0)
    assert {row.work: row.value for row in earlier_rows([one, two])} == {"dq": 3.0, "dk": 2.0}
    with pytest.raises(ConfigError, match="different devices, A, B"):
        earlier_rows([one, other])
    with pytest.raises(ConfigError, match="no measured rows"):
        earlier_rows([write("4", "A")])


def test_a_wrong_exchange_fails_and_is_named(tmp_path, monkeypatch, capsys):
    right = states.start_gated_sum
    monkeypatch.setattr(states, "start_gated_sum", lambda *a, **k: right(*a, **k).then(lambda state: state * 1.1))
    assert run("--only", "checks", "--output", str(tmp_path)) == 1
    failed = capsys.readouterr().err
    assert "linear attention over slices, chain" in failed and "window over slices" not in failed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sequence-parallel", "--links", "{bad}"), "unknown key nvlink"),
        (("sequence-parallel", "--links", "{none}"), "No such file"),
        (("sequence-parallel", "--measured", "{bad}"), "--measured"),
        (("kernels", "--links", "{bad}"), "--links is read by"),
        (("kernels", "--measured", "{bad}"), "--measured is read by"),
    ],
)
def test_a_users_error_is_one_line(tmp_path, capsys, arguments, named):
    (tmp_path / "bad.yaml").write_text("nvlink: 1\n")
    places = {"bad": str(tmp_path / "bad.yaml"), "none": str(tmp_path / "none.yaml")}
    filled = [argument.format(**places) for argument in arguments]
    assert cli.main(["bench", *filled, "--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
