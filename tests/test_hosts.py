"""What a mesh on several hosts says of itself."""

import platform
import socket

import pytest

from hf_tpsp.hosts import check_address, placement, this_host

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


@pytest.mark.parametrize(
    "name, interface, words",
    [
        ("localhost", None, "'localhost', resolves to 127.0.0.1, which other hosts cannot reach. Set GLOO_SOCKET_IFNAME"),
        ("no.such.host.invalid", None, "cannot be resolved"),
        ("localhost", "no0", "GLOO_SOCKET_IFNAME='no0', but localhost has no interface 'no0'"),
        ("localhost", "lo", None),
    ],
)  # fmt: skip
def test_a_host_that_others_would_not_find(monkeypatch, name, interface, words):
    monkeypatch.setattr(platform, "node", lambda: name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    else:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        look = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *args, **kw: look(host, *args, family=socket.AF_INET, **kw)
        )
    check_address()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if words is None:
        return check_address()
    with pytest.raises(ValueError) as error:
        check_address()
    assert words in str(error.value)
