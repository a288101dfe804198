"""Process groups for tests of what a library does by itself."""

import contextlib

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextlib.contextmanager
def world(size: int, rank: int = 0, backend: str = "fake"):
    """Be `rank` of `size` ranks. Of the backend "fake" they do not exist, and collectives leave what they are given."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        backend, rank=rank, world_size=size, store=FakeStore() if backend == "fake" else dist.HashStore()
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
