"""Which ranks are on which host, and whether a TP group stays inside one."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
from collections import Counter
from itertools import groupby
from pathlib import Path

import torch

from .config import divisors, launched_ranks
from .inputs import environment_flag, environment_number

BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> list[str]:
    """The name of this host, and what tells it from another one of that name."""
    try:
        return [platform.node(), BOOT.read_text().strip()]
    except OSError:
        return [platform.node(), ""]


def check_address() -> None:
    """Raise `ValueError` if gloo would offer the other hosts an address at which they cannot find this one.

    Where no interface is named, gloo takes the address of this host's own name, which on many systems is the loopback's:
    some ranks then fail, and others wait for them. NCCL chooses among the interfaces itself.
    """
    launched = launched_ranks()
    several = launched > environment_number("LOCAL_WORLD_SIZE", launched, least=1)
    if not several or (torch.accelerator.is_available() and not environment_flag("ACCELERATE_USE_CPU")):
        return
    there = [name for _, name in socket.if_nameindex() if name != "lo"]
    if given := os.environ.get("GLOO_SOCKET_IFNAME"):
        if unknown := [name for name in given.split(",") if name not in (*there, "lo")]:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={given!r}, but {platform.node()} has no interface {unknown[0]!r}; it has {there}."
            )
    elif (address := _own_address()) is None or ipaddress.ip_address(address).is_loopback:
        what = "cannot be resolved" if address is None else f"resolves to {address}"
        raise ValueError(
            f"The name of this host, {platform.node()!r}, {what}, which other hosts cannot reach. Set GLOO_SOCKET_IFNAME "
            f"on each host to its interface that leads to the others; here it can be one of {there}."
        )


def _own_address() -> str | None:
    """The address that gloo would take: the first of this host's name that is one of its own."""
    try:
        found = socket.getaddrinfo(platform.node(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as one:
            try:
                one.bind(address)
            except OSError:
                continue
            return str(address[0]).partition("%")[0]
    return None


def placement(hosts: list[list[str]], sizes: tuple[int, int, int]) -> str | None:
    """The sentence for a mesh on several hosts; None if all ranks are on one.

    Args:
        hosts: of each rank, in their order, as `this_host`.
        sizes: `(dp_replicate, dp_shard, tp)`.
    """
    where = [tuple(host) for host in hosts]
    ranks_of = {host: [rank for rank, other in enumerate(where) if other == host] for host in dict.fromkeys(where)}
    if len(ranks_of) == 1:
        return None
    told = "; ".join(f"{_ranges(ranks)} on {name}" for (name, _), ranks in ranks_of.items())
    tp = sizes[2]
    begin = f"The mesh {' x '.join(map(str, sizes))} (dp_replicate, dp_shard, tp) is on {len(ranks_of)} hosts: {told}"
    spanning = next((i for i in range(0, len(where), tp) if len(set(where[i : i + tp])) > 1), None)
    if spanning is None:
        return f"{begin}. Each TP group is inside one host." if tp > 1 else f"{begin}."
    counts = Counter(where).values()
    if all(count % tp == 0 for count in counts):
        remedy = (
            "Give each host consecutive ranks (Slurm: --distribution=block; torchrun: one --node-rank for each host)."
        )
    else:
        remedy = f"Inside these hosts tp_size can be one of {divisors(*counts)}."
    return (
        f"{begin}. The TP group of {_ranges(list(range(spanning, spanning + tp)))} spans hosts, so each layer waits "
        f"for the network between them. {remedy}"
    )


def _ranges(ranks: list[int]) -> str:
    """`[0, 1, 2, 5]` → `ranks 0-2, 5`, and `[3]` → `rank 3`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
