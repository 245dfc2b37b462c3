"""Bytes of state, measured on real tensors, are the published formulas."""

import pytest

from based_megatron.recall.mqar import FIGURE, TINY
from based_megatron.recall.presets import PRESETS
from based_megatron.recall.published import PUBLISHED
from based_megatron.recall.systems import SYSTEMS, Point, in_order_of_interest, pattern_points, state_bytes

FIGURE_POINTS = {
    point.name: point for system in SYSTEMS.values() for point in (make(FIGURE.vocab_size) for make in system.figure)
}
TINY_POINTS = {point.name: point for system in SYSTEMS.values() for point in (make(64) for make in system.tiny)}


def numbers(point: Point, longest_tokens: int) -> int:
    """Elements of the recurrent states, by the formulas of the papers: d width, f features, e = 1 + f + f (f + 1) / 2."""
    d, heads = point.model.hidden_size, point.model.num_heads
    f, W = point.model.feature_dim, point.model.window_left
    options = dict(word.partition(".")[2].split("=") for word in point.model.mixer_options)
    N = int(options.get("state_dim", 0))
    return {
        "mamba": 2 * 2 * d * N,
        "mamba2": 2 * 2 * d * N,
        "rwkv7": d * d // heads,
        "rwkv4": 3 * d,
        "hyena": 2 * d * longest_tokens,
        "h3": 2 * d * N,
        "deltanet": d * d // heads,
        "gated_deltanet": d * 2 * d // heads,
        "gla": d // 2 * d // heads,
        "attention": 2 * d * longest_tokens,
        "based": (d + heads) * (1 + f + f * (f + 1) // 2),
        "jrt": (d + heads) * (1 + f + f * (f + 1) // 2),
        "rebased": (d + heads) * (f * (f + 1) // 2),
        "window": 2 * d * W,
        "retnet": d * d // heads,
    }[point.system]


@pytest.mark.parametrize("name", FIGURE_POINTS)
def test_bytes_follow_the_formulas(name):
    point = FIGURE_POINTS[name]
    found = state_bytes(point.model, 1024)
    convolution = 3 * point.model.hidden_size * point.model.layer_pattern.count("b")
    assert found.recurrent == 4 * numbers(point, 1024)
    assert found.published == 4 * (numbers(point, 1024) + convolution)


BYTES = {
    "based-d48-f8": 9396,
    "based-d64-f8": 12_468,
    "based-d64-f16": 40_548,
    "based-d128-f16": 80_484,
    "based-d256-f16": 160_356,
    "window-d128-w8": 9728,
    "window-d128-w64": 67_072,
    "deltanet-d64": 8960,
    "deltanet-d128": 34_304,
    "gated_deltanet-d64": 17_152,
    "gated_deltanet-d128": 67_072,
    "rwkv7-d64": 17_152,
    "rwkv7-d128": 34_304,
    "hyena-d64": 1 << 19,
    "h3-d64": 8192,
    "h3-d128": 1 << 15,
    "gla-d64": 4864,
    "gla-d128": 17_920,
    "mamba2-d64-n8": 8192,
    "mamba2-d128-n16": 32_768,
    "mamba2-d256-n24": 98_304,
    "mamba-d64-n16": 16_384,
    "attention-d64": 4 * (2 * 64 * 1024 + 3 * 64),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_published_figure(name):
    """Zoology does not draw attention."""
    assert state_bytes(FIGURE_POINTS[name].model, 1024).published == BYTES[name]


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items() if known.zoology and name in SYSTEMS])
def test_sweeps_meet_the_published_figure(name):
    """At least two points of a system have just the bytes of published ones, so that they can be compared."""
    known = dict(PUBLISHED[name].zoology)
    points = [point for point in FIGURE_POINTS.values() if point.system == name]
    assert sum(state_bytes(point.model, 1024).published in known for point in points) >= 2


def test_the_products_own_state_is_counted_whole():
    """Based: a count, and 16 places of keys and values; a window: one slot more. In front of both, two inputs a channel."""
    based = state_bytes(FIGURE_POINTS["based-d64-f16"].model, 1024)
    assert based.product == based.recurrent + 4 + 16 * (16 + 64) * 4 + 2 * 64 * 4
    window = state_bytes(FIGURE_POINTS["window-d128-w64"].model, 1024)
    assert window.product == window.recurrent + 2 * 128 * 4 + 2 * 128 * 4
    assert state_bytes(FIGURE_POINTS["attention-d64"].model, 1024).product is None


@pytest.mark.parametrize("sizes", ["d64-f16", "d128-f16", "d64-f8"])
def test_variants_of_based_have_its_bytes(sizes):
    """ReBased has no constant and no linear features: a feature dim larger by 1 makes up for them."""
    width, features = sizes.split("-f")
    names = (f"based-{sizes}", f"jrt-{sizes}", f"rebased-{width}-f{int(features) + 1}")
    assert len({state_bytes(FIGURE_POINTS[name].model, 1024).published for name in names}) == 1


def test_tiny_points_have_the_bytes_that_are_known_of_them():
    found = {name: state_bytes(point.model, 32).published for name, point in TINY_POINTS.items()}
    known = {"attention-d32": 8576, "based-d32-f8": 6324, "based-d32-f2": 1176, "retnet-d32": 2432}
    assert {name: found[name] for name in known} == known


def test_a_pattern_of_the_product_counts_every_layer():
    """Three convolved inputs of 64 channels, Taylor states, and a window of 8."""
    (point,) = pattern_points("cLS", "", (), "tiny", 64)
    found = state_bytes(point.model, 32)
    assert point.product and found.recurrent == 4 * (33 * 45 + 2 * 32 * 8)
    assert found.published == found.recurrent + 4 * 3 * 64


def test_names_are_unique_and_systems_take_turns():
    for task, preset in ((FIGURE, "figure"), (TINY, "tiny")):
        groups = [[make(task.vocab_size) for make in getattr(system, preset)] for system in SYSTEMS.values()]
        order = in_order_of_interest(groups)
        assert len({point.name for point in order}) == len(order) == sum(map(len, groups))
        first = [group[0].name for group in groups if group]
        assert [point.name for point in order[: len(first)]] == first
    assert set(PRESETS) == {"figure", "tiny"}
