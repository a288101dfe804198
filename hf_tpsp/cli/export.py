"""`hf-tpsp export`: a checkpoint of the mesh as the folder that one process would have saved."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_trust_argument


def add(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint of the mesh as one process would have saved it",
        description="Writes a checkpoint that was saved on the mesh as a Hugging Face folder: weights or adapter, config and "
        "tokenizer, and all that a Trainer in one process resumes from. Starts no ranks; the most that is in memory is one "
        "weight file and one decoder layer.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint-N folder")
    export.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    export.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="size of a weight file (default 5)"
    )
    export.add_argument(
        "--no-optimizer",
        action="store_true",
        help="leave the optimizer's state out, which is twice as large as the weights",
    )
    add_trust_argument(export)
    export.set_defaults(run=run, parser=export)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint.export import export

    export(
        args.checkpoint,
        args.out,
        max_shard_size=args.max_shard_size,
        optimizer=not args.no_optimizer,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{args.checkpoint} is exported to {args.out}")
