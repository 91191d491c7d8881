"""A tiny assistant and rows for it to learn from."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from plm_tiny import tiny_config, tiny_model

from perception_lm.assistant import Assistant
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.training.run import DataConfig, ModelConfig, OptimizerConfig, Run, ScheduleConfig
from perception_lm.zoo import assemble

TOKENIZER = Path(__file__).parent / "golden" / "plm" / "tokenizer.model"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two, and much slower where the second is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def watched_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """`nn.Module.compile` traces as it does, and runs what it traced without generating code, which takes minutes.

    The graphs that were traced.
    """
    graphs: list[torch.fx.GraphModule] = []
    compile = torch.nn.Module.compile

    def traced(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute")  # torch hides it where it is no error
        patch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=traced, **how))
        yield graphs
    torch._dynamo.reset()


def tiny_assistant(seed: int = 0) -> Assistant:
    """24-pixel tiles of 4 tokens, the golden tokenizer, context 900."""
    config = tiny_config()
    return assemble(tiny_model(config, seed), LlamaTokenizer.from_file(TOKENIZER), config.media)


class Colours:
    """A picture of one colour, its name, and some words more or less."""

    def __init__(self, size: int = 64, seed: int = 0):
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = list(COLOURS)[(index + self.seed) % 3]
        turn = {"from": "human", "value": "<image>\nWhat?" + " really" * (index % 5)}
        answer = {"from": "assistant", "value": f"{name} {index}"}
        if index % 4 == 3:
            return {"conversations": [{"from": "human", "value": "Say it."}, answer]}
        return {"image": Image.new("RGB", (30, 20), COLOURS[name]), "conversations": [turn, answer]}


def tiny_run(out: Path, **changes: Any) -> Run:
    given = {
        "out": str(out),
        "steps": 4,
        "batch": 6,
        "model": ModelConfig(init="unused"),
        "data": DataConfig(seq_len=160, tokens=320, tiling="vanilla"),
        "optimizer": OptimizerConfig(lr=3e-3),
        "schedule": ScheduleConfig(kind="constant"),
        "export": (),
    }
    return Run(**{**given, **changes})


def write_rows(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
    """A JSONL file; texts in `rows` are written as they are."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def turns(answer: str = "yes", question: str = "What?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "assistant", "value": answer}]
