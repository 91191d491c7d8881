"""A checkpoint of a run to a model in any layout."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.device import shapes_only
from perception.errors import CheckpointError, ConfigError
from perception.pixels import PixelSpec
from perception.settings import read_settings
from perception.training.state import find_checkpoint, load_tensors, read_facts, tensor_shapes
from perception.training.trainer import Trainer
from perception_encoder import checkpoints as towers
from perception_encoder.vision import VisionTransformer
from perception_lm.assistant import Assistant
from perception_lm.checkpoints import builder, config_of
from perception_lm.config import PlmConfig
from perception_lm.tokenizer import LlamaTokenizer

log = logging.getLogger(__name__)
TASK = "model."  # where the task holds the model


def describe_model(assistant: Assistant, run: Any) -> dict[str, Any] | None:
    """What a checkpoint must say so that its tensors are a model again; None for a model of foreign parts."""
    try:
        config = config_of(assistant.model, assistant.processor.media)
    except ConfigError:
        return None
    return {
        "config": config.to_dict(),
        "media_token": assistant.model.media_token,
        "pixels": assistant.processor.preprocess.to_dict(),
        "tokenizer": assistant.tokenizer.source.decode("utf-8", errors="surrogateescape"),
        "tokenizer_file": assistant.tokenizer.filename,
    }


def load_checkpoint(path: str | Path, *, average: bool = True, dtype: torch.dtype | None = None) -> Assistant:
    """The model in a checkpoint, or in a run's newest one, on the CPU and in evaluation mode.

    average  take the running average of the weights, where the run kept one
    dtype    of the weights; float32 when not given

    Adapters are merged. Raises CheckpointError for a folder that holds none and for a checkpoint that is damaged,
    ConfigError for a model of foreign parts, which only the program that made it can put together.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path} holds no whole checkpoint of a run")
    facts = read_facts(found)
    assistant, task = open_model(facts, found)
    tensors = fill(task, found, average=average and any(n.startswith("average.") for n in tensor_shapes(found)))
    log.debug("%d tensors of %s", len(tensors), found)
    if facts["run"].get("lora"):
        from perception_lm.training.lora import merge

        merge(assistant.model)
    assistant.model.requires_grad_(False).eval()
    if dtype is not None:
        assistant.model.to(dtype)
    return assistant


def open_model(facts: dict[str, Any], where: Path) -> tuple[Assistant, nn.Module]:
    """A model of the shape that the facts tell, and the module that the names of its tensors begin at."""
    from perception_lm.training.build import build_assistant
    from perception_lm.training.run import Run, trained_on
    from perception_lm.zoo import assemble

    if facts.get("format") != "perception-lm-training" or facts.get("version") != 1:
        raise CheckpointError(f"{where} is a checkpoint of another kind of training, {facts.get('format')!r}")
    run, described = read_settings(Run, facts["run"], f"{where}, run"), facts["model"]
    if described is None:
        raise ConfigError(f"{where} is of a model with foreign parts; load it with the program that trained it")
    if facts["frozen"]:
        config = PlmConfig.from_dict(described["config"])
        pixels = PixelSpec.from_dict(described["pixels"])
        tokenizer = LlamaTokenizer.from_bytes(described["tokenizer"].encode("utf-8", errors="surrogateescape"))
        tokenizer.filename = described["tokenizer_file"]
        with shapes_only():
            model = builder(config, described["media_token"], pixels)
        assistant = assemble(model.to_empty(device="cpu"), tokenizer, config.media, pixels)
    else:
        assistant = build_assistant(run, torch.device("cpu"))
        trained_on(assistant, run)
        assistant.model.float()  # what was learned is float32, and is put into it
    if run.lora is not None:
        from perception_lm.training.lora import add_lora

        add_lora(assistant.model, run.lora)
    return assistant, assistant.model


def fill(model: nn.Module, path: Path, *, average: bool = False) -> dict[str, Tensor]:
    """Put a checkpoint's tensors into a model; returns them. Raises CheckpointError for names that do not fit."""
    known = tensor_shapes(path)
    inner = f"model.{TASK}"
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    strange = [key for key in known if key.startswith("model.") and key.removeprefix(inner) not in named]
    if strange:
        raise CheckpointError(f"{path} holds {len(strange)} tensors that the model has no place for: {strange[:3]}")
    wanted: dict[str, Tensor] = {}
    for name, tensor in named.items():
        mean = f"average.{TASK}{name}"
        key = mean if average and mean in known else f"{inner}{name}"
        if key in known:
            wanted[key] = tensor.detach()
    load_tensors(path, wanted)
    return wanted


def write_models(trainer: Trainer, run: Any) -> list[Path]:
    """What a run ends with: the model in every layout asked for, beside its checkpoints; adapters on their own, too."""
    folder = Path(run.out)
    written: list[Path] = []
    if not trainer.world.first:
        return written
    found = find_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no whole checkpoint of a run")
    if run.lora is not None:
        from perception_lm.training.lora import save_adapter

        assistant, model = open_model(read_facts(found), found)
        fill(model, found, average=bool(run.average))
        written.append(save_adapter(assistant.model, folder / "adapter", run, assistant.processor.media))
    for format in run.export:
        if format == "tower":
            target = folder / "tower"
            save_tower(load_checkpoint(found), target)
        else:
            target = folder / ("model" if format == "native" else f"model-{format}")
            load_checkpoint(found).save(target, format)
        written.append(target)
    return written


def save_tower(assistant: Assistant, folder: str | Path, *, replace: bool = True) -> None:
    """The vision tower of a model alone, as a folder that `perception_encoder.load_encoder` reads: a PE-Lang.

    replace  False: a folder that holds another model is refused

    Raises ConfigError for a tower that is not ours, CheckpointError when the disk refuses.
    """
    tower = assistant.model.encoder
    if not isinstance(tower, VisionTransformer):
        raise ConfigError(f"the tower is a {type(tower).__name__}, which its own library saves; ours are written here")
    towers.export(tower, folder, "native", replace=replace)
