"""What every kind of training shares: run files, the loop, checkpoints, processes, measurements.

files.py        a TOML file and `key=value` overrides to a frozen dataclass, strictly
order.py        which sample comes when: a number in, a number out, nothing to remember
state.py        checkpoints that are whole or not there
distributed.py  several processes, sharded parameters
metrics.py      what happened: JSONL, TensorBoard, a bar
trainer.py      the loop itself
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Checkpoints": "state",
    "Loss": "trainer",
    "Order": "order",
    "Trainer": "trainer",
    "TrainerConfig": "trainer",
    "World": "distributed",
    "read_run": "files",
}
__all__ = ["Checkpoints", "Loss", "Order", "Trainer", "TrainerConfig", "World", "read_run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
