"""The run-time check of a training on the user's own model, batch and sizes."""

from .witness import Witness

__all__ = ["Witness"]
