"""How the language model learns.

run.py       a run file, read strictly, and the trainer it describes; runs/*.toml are ready-made ones
rows.py      rows of data files to conversations; sources.py where they come from; datasets.py the file that lists them
examples.py  conversations to ids, labels, pixels; stream.py to the passes of each step
task.py      passes to a loss; packing.py, flops.py, freeze.py, tower.py, lora.py what that needs
build.py     the model a run starts from; export.py the model it ends with

from perception_lm.training import load_run, train
train(load_run("plm_1b_stage1", ["data.datasets=data.toml"]))
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Examples": "examples",
    "Jsonl": "sources",
    "Run": "run",
    "SOURCES": "sources",
    "load_checkpoint": "export",
    "load_run": "run",
    "make_trainer": "run",
    "rehearse": "launch",
    "run_names": "run",
    "train": "launch",
}
__all__ = [
    "SOURCES", "Examples", "Jsonl", "Run", "load_checkpoint", "load_run", "make_trainer", "rehearse", "run_names",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
