"""Ids, labels, losses, gradients, steps and schedules of the reference, number by number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plm_golden import load
from safetensors.torch import load_file
from torch import Tensor
from training_tiny import one_thread  # noqa: F401  every test here runs with it

from perception.checkpoint import convert
from perception.training.metrics import read_metrics
from perception.training.state import KeepConfig
from perception.training.trainer import Trainer, TrainerConfig
from perception_lm.checkpoints import config_of, original
from perception_lm.config import MediaConfig
from perception_lm.losses import IGNORE
from perception_lm.processor import MediaOptions, Processor
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.training.examples import Example, Examples, Pack, join, pad
from perception_lm.training.rows import read_row
from perception_lm.training.run import OptimizerConfig, make_optimizer
from perception_lm.training.schedule import factor
from perception_lm.training.stream import Report, Step
from perception_lm.training.task import AnswerTask

FOLDER = Path(__file__).parents[1] / "golden" / "training"
FACTS = json.loads((FOLDER / "training.json").read_text())
TOKENIZER = Path(__file__).parents[1] / "golden" / "plm" / "tokenizer.model"


def tokenizer() -> LlamaTokenizer:
    return LlamaTokenizer.from_file(TOKENIZER)


@pytest.mark.parametrize("name", list(FACTS["samples"]))
def test_ids_and_labels(name: str) -> None:
    """Traps 25, 26 and 27: what is learned, what is cut, and the plain form of the first stage."""
    sample = FACTS["samples"][name]
    slots = (sample["image_size"] // sample["patch_size"] // sample["pooling_ratio"]) ** 2
    several = sample["media_type"] == "multi_image"
    # Three tiles: a thumbnail and two, which is what a picture twice as wide as high becomes.
    media = MediaConfig(tile=32, max_tiles=2 if sample["n_chunks"] == 3 else 1, frames=8, context=10_000)
    picture = torch.zeros(3, 32, 64, dtype=torch.uint8)
    row = {"conversations": sample["conversation"]}
    if sample["media_type"] != "text":
        row["image"] = [picture] * sample["n_chunks"] if several else picture
    processor = Processor(tokenizer(), media, slots)
    tiling = "thumb+tile" if sample["n_chunks"] == 3 else "vanilla"
    examples = Examples(
        processor=processor,
        seq_len=sample["seq_len"],
        form="warmup" if sample["conversation_format"] == "warmup" else "chat",
        options=MediaOptions(tiling=tiling),  # type: ignore[arg-type]
    )
    example = examples(read_row(row))
    ids = sample["text_ids"]
    assert example.tokens.tolist() == ids[:-1]
    assert len(example) == examples.length(read_row(row)) == sample["collated_x_length_before_padding"]
    at = (example.labels != IGNORE).nonzero().flatten().tolist()
    assert at == sample["collated_mask_positions"]
    assert example.labels[at].tolist() == sample["collated_labels_at_mask"]
    assert (example.tokens == processor.tokenizer.image_token).nonzero().flatten().tolist() == sample["image_pos"]
    count = 0 if example.pixels is None else len(example.pixels)
    assert count == (0 if sample["media_type"] == "text" else sample["n_chunks"])


def golden_batch(name: str) -> tuple[list[Example], int]:
    """The reference's padded batch as single samples, and the width it was padded to."""
    facts, values = FACTS["models"][name], load_file(FOLDER / "batch.safetensors")
    examples = []
    for row, sample in enumerate(facts["batch_order"]):
        length = FACTS["samples"][sample]["collated_x_length_before_padding"]
        if name == "B" and sample != "text_only":  # its tiles are 9 tokens, not 16
            length = (
                int((values[f"{name}.image_pos_index"][row] >= 0).sum()) - 16 * facts["num_image_chunks"][row] + length
            )
        mask, labels = values[f"{name}.mask"][row].bool(), values[f"{name}.y"][row].long()
        media = values.get(f"{name}.{sample}.media_fp16")
        examples.append(
            Example(
                values[f"{name}.x"][row, :length].long(),
                torch.where(mask, labels, IGNORE)[:length],
                None if media is None else media.float(),
            )
        )
    return examples, values[f"{name}.x"].shape[1]


def passes(name: str, layout: str) -> list[Pack]:
    examples, width = golden_batch(name)
    if layout == "singles":
        return [join([example]) for example in examples]
    return [join(examples) if layout == "packed" else pad(examples, width, 434)]


def theirs(name: str, task: AnswerTask, what: str) -> dict[str, Tensor]:
    """Gradients (or weights) by the reference's names."""
    named = dict(task.model.named_parameters())
    ours = {key: (p.grad if what == "grad" else p).detach() for key, p in named.items()}  # type: ignore[union-attr]
    return dict(convert(ours, original(config_of(task.model)), back=True))


@pytest.mark.parametrize("layout", ["packed", "padded", "singles"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_loss_and_gradients(name: str, layout: str) -> None:
    facts, task = FACTS["models"][name], AnswerTask(load(name).train())
    losses = [task(pack) for pack in passes(name, layout)]
    if layout == "singles":
        for sample, loss in zip(facts["batch_order"], losses, strict=True):
            expected = facts["loss_per_sample"][sample]
            assert loss.weight == expected["n_loss_tokens"]
            assert float(loss.total.detach()) / loss.weight == pytest.approx(expected["loss"], rel=1e-5)
    weight = sum(loss.weight for loss in losses)
    total = sum(loss.total for loss in losses) / weight
    assert float(total.detach()) == pytest.approx(facts["loss"], rel=1e-5)
    total.backward()  # type: ignore[union-attr]
    gradients = theirs(name, task, "grad")
    for key, norm in facts["gradient_norms"].items():
        assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-4), key


@pytest.mark.parametrize("layout", ["packed", "singles"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_six_steps(name: str, layout: str, tmp_path: Path) -> None:
    """Through the trainer: the schedule, the clipping, the decay on everything, one pass or three accumulated."""
    facts, task = FACTS["models"][name], AnswerTask(load(name))
    o = facts["optimizer"]
    config = OptimizerConfig(lr=o["lr"], betas=tuple(o["betas"]), eps=o["eps"], weight_decay=o["weight_decay"])
    trainer = Trainer(
        task,
        [make_optimizer(task, config)],
        Same(passes(name, layout)),
        TrainerConfig(steps=len(facts["steps"]), batch=3, clip=o["clip"], keep=KeepConfig(steps=0), tensorboard=False),
        tmp_path,
        schedule=lambda s: factor("cosine", s, o["n_steps"], warmup=o["warmup"], floor=o["lr_min_ratio"]),
    )
    assert trainer.run()
    for line, expected in zip(read_metrics(tmp_path), facts["steps"], strict=True):
        assert line["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)


class Same:
    """The same passes every step."""

    def __init__(self, packs: list[Pack]):
        self.packs = packs

    def steps(self, position: int) -> Any:
        while True:
            yield Step(iter(self.packs), Report(samples=3))


@pytest.mark.parametrize("case", list(FACTS["lr_schedules"]))
def test_schedules(case: str) -> None:
    facts = FACTS["lr_schedules"][case]
    shape = {"warmup": facts["warmup"], "floor": facts["lr_min_ratio"]}
    for kind, expected in {"cosine": facts["factor"], **facts["other_schedulers_factor"]}.items():
        found = [factor(kind, step, facts["n_steps"], **shape) for step in facts["steps"]]
        assert found == pytest.approx(expected, rel=1e-9), kind
