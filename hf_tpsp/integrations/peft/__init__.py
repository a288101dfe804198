"""peft: LoRA, DoRA and `modules_to_save` on sharded layers."""

from ..contract import Integration
from .adapters import is_adapted, shard_adapted
from .patches import install

PEFT = Integration(install, wraps=is_adapted, shard=shard_adapted)
