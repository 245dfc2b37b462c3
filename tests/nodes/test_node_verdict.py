"""Which nodes are named as bad, from made-up measurements."""

import dataclasses

import pytest

from based_megatron.nodes.measure import RankReport
from based_megatron.nodes.network import ROUNDS, partner
from based_megatron.nodes.verdict import Limits, NodeReport, reasons

LIMITS = Limits(device=0.85, network=0.5)
VERSIONS = {"torch": "2.13.0", "device": "H100"}


def rank(number: int, host: str, **changes) -> RankReport:
    good = RankReport(number, host, VERSIONS, matrix_flops=700e12, memory_bytes_per_second=3e12, product="abc")
    return dataclasses.replace(good, **changes)


def nodes(count: int = 4, **changes) -> list[NodeReport]:
    """Good nodes of two ranks, the second of them changed: fields of the node, or of its second rank."""
    of_rank = {key: changes.pop(key) for key in list(changes) if key in RankReport.__dataclass_fields__}
    found = []
    for i in range(count):
        host = f"n{i}"
        ranks = (rank(2 * i, host), rank(2 * i + 1, host, **(of_rank if i == 1 else {})))
        around = {f"n{other}": 40e9 for other in ((i - 1) % count, (i + 1) % count) if other != i}
        node = NodeReport(host, ranks, (), 0.01 * i, 1e9, 400e9, around)
        found.append(dataclasses.replace(node, **changes) if i == 1 else node)
    return found


def test_equal_nodes_are_good():
    assert reasons(nodes(), LIMITS) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(matrix_flops=0.84 * 700e12), "matrix rate of rank 3 is 588,000.0 GFLOP/s, 84 % of the median"),
        (dict(memory_bytes_per_second=1e12), "memory rate of rank 3 is 1,000.0 GB/s, 33 % of the median"),
        (dict(product="abd"), "rank 3 computes another product (abd, others abc)"),
        (dict(versions=VERSIONS | {"torch": "2.12.0"}), "torch of rank 3 is 2.12.0, others have 2.13.0"),
        (dict(versions={"torch": "2.13.0"}), "device of rank 3 is missing, others have H100"),
        (dict(versions=VERSIONS | {"driver": "570"}), "driver of rank 3 is 570, others have missing"),
        (dict(silent_ranks=[3]), "no answer from rank 3"),
        (dict(inside_bytes_per_second=199e9), "all-reduce inside the node is 199.0 GB/s, 50 % of the median"),
        (dict(file_bytes_per_second=0.09e9), "file system is 0.1 GB/s, 9 % of the median"),
        (dict(neighbours={"n0": 19e9, "n2": 10e9}), "all-reduce with neighbours is 19.0 GB/s, 48 % of the median"),
        (dict(neighbours={"n0": 0.0, "n2": 0.0}), "all-reduce with neighbours failed"),
        (dict(clock_seconds=-2.5), "clock is -2.5 s from that of n0"),
        (dict(errors=["file system: [Errno 28] No space left on device"]), "file system: [Errno 28] No space left on device"),
    ],
)  # fmt: skip
def test_a_bad_node_is_named_with_its_reason(changes, expected):
    assert reasons(nodes(**changes), LIMITS) == {"n1": [expected]}


@pytest.mark.parametrize(
    "changes",
    [
        dict(matrix_flops=0.86 * 700e12),
        dict(inside_bytes_per_second=201e9),
        dict(inside_bytes_per_second=None),
        dict(file_bytes_per_second=0.11e9),
        dict(clock_seconds=1.9),
        # The fault is the neighbour's, or the link's.
        dict(neighbours={"n0": 1e9, "n2": 40e9}),
    ],
)
def test_what_is_within_the_limits_is_good(changes):
    assert reasons(nodes(**changes), LIMITS) == {}


def test_of_two_nodes_the_slow_one_is_named():
    assert list(reasons(nodes(2, matrix_flops=1e12), LIMITS)) == ["n1"]


def test_a_node_without_any_answer_is_named():
    reports = [*nodes(), NodeReport("n9", (), (8, 9))]
    assert reasons(reports, LIMITS) == {"n9": ["no answer from rank 8, 9"]}


@pytest.mark.parametrize("count", range(1, 10))
def test_neighbours_meet_each_other(count):
    """In each round the pairs are disjoint; with more than two nodes every node meets another one at least once, all but the ends twice."""
    met: list[set[int]] = [set() for _ in range(count)]
    for number in range(ROUNDS):
        for node in range(count):
            other = partner(node, count, number)
            if other is not None:
                assert other != node and partner(other, count, number) == node
                met[node].add(other)
    expected = [{(i - 1) % count, (i + 1) % count} - {i} for i in range(count)]
    if count % 2:
        # The ends of an odd ring do not meet.
        expected[0] -= {count - 1}
        expected[-1] -= {0}
    assert met == expected
