"""`python -m hf_tpsp.cli`: the `hf-tpsp` command."""

from . import main

main()
