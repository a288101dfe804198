"""Devices that the host waits for."""

import torch


def is_waited_for(device: torch.device) -> bool:
    """Whether the host that reads a value of `device` waits for all that the device was given before. Tests of that path
    on the CPU replace this function."""
    return device.type != "cpu"
