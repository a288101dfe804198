"""`hf-tpsp`: make an accelerate config, print a plan, compare with one process, estimate a run, export a checkpoint.

Each command has a file: `add` declares its arguments, `run` executes it. A command imports what only it needs inside
`run`, so that `--help` and `config` need neither torch nor transformers.
"""

from __future__ import annotations

from . import config, env, estimate, export, plan, verify
from .arguments import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="hf-tpsp", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (config, plan, verify, estimate, export, env):
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        args.parser.error(str(error))
