"""The command-line arguments for the sizes of a mesh."""

from __future__ import annotations

import argparse

from ..config import TPSPConfig


def add_mesh_arguments(parser: argparse.ArgumentParser, tp: int = 1) -> None:
    parser.add_argument("--tp", type=int, default=tp, metavar="N", help=f"tensor-parallel size (default {tp})")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="FSDP shard size (default 1)")
    parser.add_argument("--dp-replicate", type=int, default=1, metavar="N", help="HSDP replicas (default 1)")


def mesh_config(args: argparse.Namespace, **settings) -> TPSPConfig:
    return TPSPConfig(tp_size=args.tp, dp_shard_size=args.dp, dp_replicate_size=args.dp_replicate, **settings)
