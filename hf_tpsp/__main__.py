"""`python -m hf_tpsp SCRIPT ARGS`: run an unmodified training script under hf_tpsp.

accelerate launch --config_file mesh.yaml -m hf_tpsp train.py --its --arguments
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from .api import enable
from .inputs import nearest

USAGE = "usage: accelerate launch --config_file mesh.yaml -m hf_tpsp [-m MODULE | SCRIPT] [ARGS]"


def refuse(message: str) -> NoReturn:
    print(f"hf_tpsp: {message}", file=sys.stderr)
    sys.exit(2)


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def main() -> None:
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if as_module:
        arguments = arguments[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        return print(USAGE)
    if not arguments:
        refuse(f"no script was given. {USAGE}")
    script = arguments[0]
    if as_module and not is_module(script):
        refuse(f"there is no module {script!r} (looked in {os.getcwd()} and where Python looks)")
    if not as_module and not Path(script).is_file():
        near = nearest(Path(script).name, (path.name for path in Path(script).parent.glob("*.py")))
        refuse(f"there is no script {script!r} (looked in {os.getcwd()}).{near}")
    try:
        enable()
    except (ValueError, TypeError) as error:
        refuse(str(error))
    sys.argv = arguments
    if as_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        # `python SCRIPT` puts the script's folder there too.
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
