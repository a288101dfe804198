"""`python -m hf_tpsp SCRIPT ARGS`: run an unmodified training script under hf_tpsp.

accelerate launch --config_file mesh.yaml -m hf_tpsp train.py --its --arguments
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .api import enable


def main() -> None:
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if as_module:
        arguments = arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit("usage: accelerate launch --config_file mesh.yaml -m hf_tpsp [-m MODULE | SCRIPT] [ARGS]")
    script = arguments[0]
    if not as_module and not Path(script).is_file():
        sys.exit(f"hf_tpsp: there is no script {script!r}")
    try:
        enable()
    except ValueError as error:
        sys.exit(f"hf_tpsp: {error}")
    sys.argv = arguments
    if as_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        # `python SCRIPT` puts the script's folder there too.
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
