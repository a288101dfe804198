"""`hf-tpsp env`: prints what a problem report should say about the machine."""

from __future__ import annotations

import argparse
import os
import platform

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes")
VARIABLES = (
    "HF_TPSP_",
    "ACCELERATE_",
    "PARALLELISM_CONFIG_",
    "FSDP_",
    "OMP_NUM_THREADS",
    "WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
)


def add(commands) -> None:
    env = commands.add_parser(
        "env",
        help="print versions, devices and settings, for a report of a problem",
        description="Prints the versions of the libraries beside those that the suite was run on, the devices, and the environment "
        "variables that hf_tpsp and accelerate read.",
    )
    env.set_defaults(run=run, parser=env)


def run(args: argparse.Namespace) -> None:
    from .. import __version__
    from ..upstream.versions import libraries

    rows = [("hf_tpsp", __version__, ""), ("python", platform.python_version(), "")]
    for library in libraries(*LIBRARIES):
        if library.tested is None:
            note = (
                ""
                if library.version is None or library.name == "bitsandbytes"
                else "no range known: hf_tpsp is not installed"
            )
        else:
            note = f"{'tested' if library.is_tested else 'NOT TESTED'}: {library.tested}"
        rows.append((library.name, library.version or "not installed", note))
    rows += [("platform", platform.platform(), ""), *_devices()]
    for name, value, note in rows:
        print(f"{name:<14}{value:<20}{note}".rstrip())
    for name in sorted(name for name in os.environ if name.startswith(VARIABLES)):
        print(f"{name}={os.environ[name]}")


def _devices() -> list[tuple[str, str, str]]:
    import torch

    rows = [("CUDA", torch.version.cuda or "torch is built without", "")]
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None
    if kind is None:
        return [*rows, ("devices", f"{os.cpu_count()} CPU cores", "")]
    names = [getattr(torch, kind).get_device_name(i) for i in range(torch.accelerator.device_count())]
    return [*rows, *(("devices", f"{names.count(name)} x {name}", "") for name in dict.fromkeys(names))]
