"""A run file to a trained encoder; what `perception train-encoder` does."""

import json
import logging
import re
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perception.errors import CheckpointError, ConfigError
from perception.files import atomic_write
from perception.settings import read_settings
from perception.training.distributed import World, processes, shard, whole_tensor
from perception.training.state import find_checkpoint, load_tensors, read_facts, tensor_shapes
from perception.training.trainer import Trainer, TrainerConfig
from perception_encoder.clip import CLIP
from perception_encoder.training.config import Run
from perception_encoder.training.optim import layer_groups, warmup_cosine
from perception_encoder.training.pairs import Pairs, PairStream, class_names, open_pairs
from perception_encoder.training.recipes import adapt_tower, to_spatial
from perception_encoder.training.tasks import ClassifyTask, ContrastiveTask, SpatialTask, embed, exact, units
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import load_clip, load_encoder, save

log = logging.getLogger(__name__)
FORMAT = "perception-encoder-training"


def train(run: Run, *, model: Any = None, pairs: Pairs | None = None, progress: bool | None = None) -> bool:
    """Train to the end of a run, from its newest checkpoint if it was begun before. False when it was told to stop.

    model     a CLIP model or a tower to start from, in place of the run file's; it is changed
    pairs     samples in place of the run file's
    progress  whether to show a bar; where there is a terminal when not given

    At the end the model is in `out/model`. Raises what `make_trainer` and `Trainer.run` raise.
    """
    with processes(run.engine) as world:
        trainer = make_trainer(run, world, model=model, pairs=pairs, progress=progress)
        done = trainer.run()
        if isinstance(trainer.task, ContrastiveTask):
            trainer.task.hand_back()  # all together, and so before the first is busy alone
        if done:
            write_model(trainer, Path(run.out) / "model")
        return done


def rehearse(run: Run, *, model: Any = None, pairs: Pairs | None = None) -> dict[str, Any]:
    """One step of a run in a folder of its own that is thrown away: shapes, parameters, rates, memory, time.

    Raises ConfigError when nothing was learned in it.
    """
    import tempfile

    with processes(run.engine) as world, tempfile.TemporaryDirectory() as folder:
        trial = replace(run, out=str(Path(world.same(folder)) / "run"), tensorboard=False)
        trainer = make_trainer(trial, world, model=model, pairs=pairs, progress=False)
        named = list(trainer.task.named_parameters())
        line = trainer.rehearse(trainer.data.steps(0))
        if isinstance(trainer.task, ContrastiveTask):
            trainer.task.hand_back()
        return {
            "out": run.out,
            "task": run.task,
            "processes": world.size,
            "device": str(world.device),
            "samples": len(trainer.data.pairs),  # type: ignore[attr-defined]
            "parameters": sum(p.numel() for _, p in named),
            "learn": sum(p.numel() for _, p in named if p.requires_grad),
            "rates": sorted({group["lr"] for o in trainer.optimizers for group in o.param_groups}),
            "step": line,
        }


def make_trainer(
    run: Run,
    world: World | None = None,
    *,
    model: Any = None,
    pairs: Pairs | None = None,
    progress: bool | None = None,
) -> Trainer:
    """The trainer of a run, its model and data in place. Raises what reading the model and the data raises."""
    world = world or World()
    torch.manual_seed(run.seed)
    pairs = pairs if pairs is not None else open_pairs(run.data)
    model = (model if model is not None else _model(run)).float().to(world.device)
    task, extra = _task(run, model, pairs, world)
    _learn_only(task, run.model.learn)
    if run.engine.checkpointing:
        for part in task.modules():
            if callable(switch := getattr(part, "set_grad_checkpointing", None)):
                switch()
    if run.engine.compile:
        for unit in units(task):
            unit.compile(dynamic=True)
    groups = layer_groups(task, run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.layer_decay)
    by_name = {id(p): name for name, p in task.named_parameters()}
    for group in groups:
        group["params"] = [by_name[id(p)] for p in group["params"]]
    shard(task, units(task), run.engine, world, exact(task))  # parameters are others from here on: found again by name
    named = dict(task.named_parameters())
    groups = [{**group, "params": [named[name] for name in group["params"]]} for group in groups]
    o, classes = run.optimizer, extra.pop("classes", None)
    data = PairStream(
        pairs,
        run.data,
        _preprocess(model),
        run.batch,
        seed=run.seed,
        classes=None if classes is None else {name: i for i, name in enumerate(classes)},
        rank=world.rank,
        size=world.size,
        **extra,
    )
    config = TrainerConfig(
        steps=run.steps,
        batch=run.batch,
        seed=run.seed,
        clip=o.clip,
        average=run.average,
        max_bad=int(run.data.max_bad * len(pairs)),
        log_every=run.log_every,
        stop_after=run.stop_after,
        keep=run.keep,
        tensorboard=run.tensorboard,
    )
    facts = {
        "format": FORMAT,
        "version": 1,
        "run": asdict(run),
        "classes": classes,
        "fingerprints": {"data": {"samples": len(pairs), "fingerprint": pairs.fingerprint()}},
    }
    return Trainer(
        task,
        [torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)],
        data,
        config,
        run.out,
        schedule=lambda step: warmup_cosine(step, run.steps, run.schedule.warmup, run.schedule.floor),
        world=world,
        facts=facts,
        progress=progress,
    )


def write_model(trainer: Trainer, folder: Path) -> Path:
    """The model of a trainer, with its averaged weights where there are any, as a folder of our format.

    All processes call it together; the first writes. Labels of a classifier are in head.json, its weights beside.
    """
    values = {name: whole_tensor(p.detach()).cpu() for name, p in trainer.task.named_parameters()}
    values |= {name: whole_tensor(p.detach()).cpu() for name, p in trainer.averages.items()}
    if not trainer.world.first:
        return folder
    live: Any = trainer.task.model
    prefix = "distillation.student." if isinstance(trainer.task, SpatialTask) else "model."
    state = {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}
    if isinstance(live, CLIP):
        state["logit_scale"] = values["logit_scale.value"][0]
    save(_rebuilt(live, state), folder)
    if (classes := trainer.facts.get("classes")) is not None:
        from safetensors.torch import save_file

        with atomic_write(folder / "head.safetensors") as temporary:
            head = {name: t.contiguous() for name, t in values.items() if name.startswith("head.")}
            save_file(head, temporary)
        with atomic_write(folder / "head.json") as temporary:
            temporary.write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")
    return folder


def load_checkpoint(path: str | Path, *, average: bool = True) -> CLIP | VisionTransformer:
    """The model in a checkpoint, or in a run's newest one, on the CPU and in evaluation mode; a classifier's tower.

    average  take the running average of the weights, where the run kept one

    Raises CheckpointError for a folder that holds none or one of another kind of training, and what loading the model
    that the run began with raises.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path} holds no whole checkpoint of a run")
    facts = read_facts(found)
    if facts.get("format") != FORMAT or facts.get("version") != 1:
        raise CheckpointError(f"{found} is a checkpoint of another kind of training, {facts.get('format')!r}")
    run, known = read_settings(Run, facts["run"], f"{found}, run"), tensor_shapes(found)
    model: Any = _model(run).float()
    prefix = "model."
    if run.task == "spatial":
        model, prefix = to_spatial(model, layer_scale=run.model.layer_scale), "distillation.student."
    wanted: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        both = isinstance(model, CLIP) and name == "logit_scale"
        inner, tensor = (
            ("logit_scale.value", parameter.detach().view(1)) if both else (prefix + name, parameter.detach())
        )
        mean = f"average.{inner}"
        wanted[mean if average and mean in known else f"model.{inner}"] = tensor
    if missing := sorted(set(wanted) - set(known)):
        raise CheckpointError(f"{found} lacks {len(missing)} tensors of the model it says it is of: {missing[:3]}")
    load_tensors(found, wanted)
    return model.requires_grad_(False).eval()


def _rebuilt(live: Any, state: dict[str, torch.Tensor]) -> nn.Module:
    """A plain copy, on the CPU, of a model that may be spread over processes."""
    new: nn.Module
    if isinstance(live, CLIP):
        from perception_encoder.text import TextTransformer

        vision = VisionTransformer(live.vision.config, live.vision.preprocess)
        new = CLIP(vision, TextTransformer(live.text.config), live.preprocess, live.tokenize)
    else:
        new = VisionTransformer(live.config, live.preprocess)
    new.load_state_dict(state)
    return new.eval()


def _model(run: Run) -> CLIP | VisionTransformer:
    """What the run file says to begin with."""
    settings = run.model
    both = run.task == "contrastive"
    model: Any = (load_clip if both else load_encoder)(settings.init, device="cpu", dtype="fp32")
    if settings.fresh:
        for part in (model.vision, model.text) if both else (model,):
            for inner in part.modules():
                if inner is not part and callable(reset := getattr(inner, "reset_parameters", None)):
                    reset()
            part.reset_parameters()
    if run.task != "classify" and settings.drop_last:
        raise ConfigError(f"model.drop_last is not for task={run.task!r}")
    if both and settings.layer_scale is not None:
        raise ConfigError("model.layer_scale is not for task='contrastive'")
    if run.task == "classify" and (settings.drop_last or settings.layer_scale is not None):
        depth = model.config.depth - settings.drop_last
        model = adapt_tower(model, depth=depth, layer_scale=settings.layer_scale)
    return model


def _task(run: Run, model: Any, pairs: Pairs, world: World) -> tuple[nn.Module, dict[str, Any]]:
    """The task, and what its data needs besides."""
    if run.task == "contrastive":
        teacher, width = (None, 0) if run.loss.teacher is None else _teacher(run.loss.teacher, world)
        task = ContrastiveTask(model, run.loss, teacher=teacher, width=width, together=world.size > 1)
        return task.to(world.device), {"teacher": None if teacher is None else teacher.preprocess}
    if run.task == "classify":
        classes = class_names(pairs)
        return ClassifyTask(model, classes, run.loss.smooth).to(world.device), {"classes": classes}
    frozen = deepcopy(model)
    return SpatialTask(to_spatial(model, layer_scale=run.model.layer_scale), frozen, run.loss), {}


class _Teacher:
    def __init__(self, tower: VisionTransformer):
        self.tower, self.preprocess = tower, tower.preprocess

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return embed(self.tower, pixels)


def _teacher(name: str, world: World) -> tuple[_Teacher, int]:
    found = load_encoder(name, device=world.device, dtype="fp32")
    if not isinstance(found, VisionTransformer):
        raise ConfigError(f"the teacher {name!r} is no tower of ours")
    tower = found.requires_grad_(False).eval()
    width = (tower.config.output_width or tower.width) if tower.pool is not None else tower.width
    return _Teacher(tower), width


def _preprocess(model: Any) -> Any:
    return model.preprocess


def _learn_only(task: nn.Module, patterns: tuple[str, ...]) -> None:
    """Freeze what no pattern begins to match. Raises ConfigError for a pattern of nothing."""
    used = set()
    for name, parameter in task.named_parameters():
        inner = name.removeprefix("model.").removeprefix("distillation.student.")
        hits = {p for p in patterns if re.match(p, inner)} | ({"head"} & {name.split(".")[0]})
        used |= hits
        parameter.requires_grad_(bool(hits))
    if unused := [p for p in patterns if p not in used]:
        raise ConfigError(f"model.learn {unused} match no parameter")
