"""Links and bytes of exchanges: formulas against values computed by hand from NCCL's latencies, for a state of 1.107 MB."""

import pytest

from based_megatron.config.load import load_config
from based_megatron.errors import ConfigError
from benchmarks.sequence_parallel.links import Links, read_links
from benchmarks.sequence_parallel.results import Way
from benchmarks.sequence_parallel.simulation import gradients_exposed_ms
from benchmarks.sequence_parallel.step_model import state_exchange_us
from benchmarks.sequence_parallel.traffic import LayerTraffic

LINKS = Links()
BASED_1B = LayerTraffic.of(load_config("based-1b").model)
STATE_BYTES = 153 * 113 * 16 * 4


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
    assert state_exchange_us(LINKS, BASED_1B, 16, Way.AUTO) == LINKS.two_level_us(16, STATE_BYTES)
    assert state_exchange_us(LINKS, BASED_1B, 8, Way.AUTO) == LINKS.all_gather_us(8, STATE_BYTES)


def test_a_chain_crosses_each_link_once():
    nvlink, network = 8 + STATE_BYTES / 350e3, 12 + STATE_BYTES / 45e3
    assert LINKS.chain_us(1, STATE_BYTES) == 0
    assert LINKS.chain_us(8, STATE_BYTES) == pytest.approx(7 * nvlink)
    assert LINKS.chain_us(24, STATE_BYTES) == pytest.approx(21 * nvlink + 2 * network)
    assert LINKS.hops_us(9, STATE_BYTES) == pytest.approx([nvlink] * 7 + [network])


def test_bytes_of_a_layer_are_the_formulas():
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
    """Based-1.3B at 331.6 ms for 16384 tokens: of 512 ranks only the embedding's 90 million elements are exposed, in both passes."""
    ms, buckets = 331.6, BASED_1B.zero_buckets(512)
    assert (len(buckets), buckets[0], sum(buckets)) == (9, 50_264 * 1792, 1_349_453_056)
    around = 8.4e-3 + (63 * 14 + 448 * 3.4) / 1e3
    embedding = 2 * around + 6 * 511 / 512 * buckets[0] / 350e6
    assert gradients_exposed_ms(LINKS, 512, buckets, ms / 3, 2 * ms / 3) == pytest.approx(embedding, rel=0.01)
    others = 2 * 8 * around + 6 * 511 / 512 * sum(buckets[1:]) / 350e6
    all_of_it = gradients_exposed_ms(LINKS, 512, buckets, ms / 24, ms / 12)
    assert all_of_it == pytest.approx(embedding + max(0, others - 0.9 * ms / 8), rel=0.02)
    assert gradients_exposed_ms(LINKS, 1, buckets, 1, 1) == 0


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
