"""What a mesh on several hosts says of itself."""

import pytest

from hf_tpsp.hosts import placement, this_host

A, B = ["a", "1"], ["b", "2"]


def test_one_host_says_nothing():
    assert placement([this_host()] * 4, (1, 2, 2)) is None


def test_two_hosts_of_one_name_are_two():
    assert "ranks 0-1 on a; ranks 2-3 on a." in placement([A, A, ["a", "2"], ["a", "2"]], (1, 2, 2))


@pytest.mark.parametrize(
    "hosts, sizes, words",
    [
        ([A, A, B, B], (1, 2, 2), "(dp_replicate, dp_shard, tp) is on 2 hosts: ranks 0-1 on a; ranks 2-3 on b. Each TP group is inside"),
        ([A, A, B, B], (1, 1, 4), "ranks 0-3 spans hosts, so each layer waits for the network between them. Inside these hosts tp_size can be one of [1, 2]."),
        ([A, B, A, B], (1, 2, 2), "ranks 0, 2 on a; ranks 1, 3 on b. The TP group of ranks 0-1 spans hosts, so each layer waits for the network between them. Give"),
        ([A, A, A, B], (1, 2, 2), "The TP group of ranks 2-3 spans hosts"),
        ([A, B], (1, 2, 1), "rank 0 on a; rank 1 on b."),
    ],
)  # fmt: skip
def test_where_the_ranks_are(hosts, sizes, words):
    assert words in placement(hosts, sizes)
