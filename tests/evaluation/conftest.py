"""What judges is tested on the trainer's planted caches, and on one thread as the trainer is."""

from tests.training.conftest import _deterministic_on_one_thread, planted

__all__ = ["_deterministic_on_one_thread", "planted"]
