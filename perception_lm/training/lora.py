"""Low-rank adapters (Hu et al. 2021) by peft: put on, saved, loaded, merged.

An adapter is a folder as peft writes one, `adapter_config.json` and `adapter_model.safetensors`, with the projector or
whatever else was learned whole beside the matrices. `perception_lm.load` takes it like a model.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perception.checkpoint import MAX_CONFIG, inside, open_checkpoint, read_json, write_safetensors
from perception.errors import CheckpointError, ConfigError, missing_extra
from perception.files import atomic_write
from perception.settings import read_settings
from perception_lm.config import MediaConfig

if TYPE_CHECKING:
    from perception_lm.assistant import Assistant

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = "perception.json"  # what peft's config has no place for
CHANGES = ("image_size", "depth", "layer_scale", "pool")  # that a run makes to the model it starts from
PREFIX = "base_model.model."  # peft's own
NAME = "default"


def add_lora(model: nn.Module, config: Any) -> list[str]:
    """Put adapters on the linear layers whose whole names match `config.targets`; returns those names.

    Raises ConfigError when nothing matches, and for what matches and is no linear layer, MissingExtra without peft.
    """
    peft = _peft()
    names = targets(model, config.targets)
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    peft.inject_adapter_in_model(lora, model, adapter_name=NAME)
    return names


def _peft() -> ModuleType:
    """peft, beside a torchvision that cannot be loaded, too.

    peft imports transformers, and transformers any torchvision that is installed. Adapters need none, so one that was
    built for another torch ("operator torchvision::nms does not exist") counts as not installed while they look.
    """
    with contextlib.ExitStack() as stack:
        try:
            import_module("torchvision")
        except Exception:
            stack.enter_context(_hidden("torchvision"))
        try:
            return import_module("peft")
        except Exception as error:  # whatever its own imports meet
            raise missing_extra("peft", "train", f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """A package that cannot be found, for as long as the block lasts."""
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def targets(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """The linear layers that some pattern matches from the first letter to the last: a suffix never reaches the tower
    when the decoder was meant."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: list[str] = []
    for pattern in patterns:
        try:
            match = [name for name in linear if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"lora.targets: {pattern!r} is no regular expression: {error}") from error
        if not match:
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no linear layer from end to end; there are, for example, "
                f"{', '.join(linear[-4:])}"
            )
        found += [name for name in match if name not in found]
    return found


def merge(model: nn.Module) -> None:
    """Fold every adapter into its layer; the model is plain again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of the adapters, and every other parameter that learns, by peft's names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            found[PREFIX + name.replace(f".{NAME}.", ".")] = parameter.detach()
        elif parameter.requires_grad:
            found[PREFIX + name] = parameter.detach()
    return found


def save_adapter(model: nn.Module, folder: str | Path, run: Any, media: MediaConfig | None = None) -> Path:
    """Write the adapters of a model, and how to put them on again. Returns the folder.

    media  how the model was shown media while it learned
    """
    from perception_lm.training.freeze import learn_only

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    learn_only(model, (*run.model.learn, r".*\.lora_[AB]\..*")) if run.model.learn else None
    layers = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    state = adapter_state(model)
    whole = sorted({name.removeprefix(PREFIX).split(".")[0] for name in state if ".lora_" not in name})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": run.model.init,
        "target_modules": layers,
        "modules_to_save": whole or None,
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "lora_dropout": run.lora.dropout,
        "bias": "none",
        "inference_mode": True,
    }
    with atomic_write(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, {name: tensor.contiguous() for name, tensor in state.items()})
    ours: dict[str, Any] = {"changes": {name: getattr(run.model, name) for name in CHANGES}}
    if media is not None:
        ours["media"] = media.to_dict()
    # peft's file last: it is what makes a folder an adapter, and without ours it would be put on another model's cuts.
    for name, content in ((OURS, ours), (CONFIG, config)):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def as_trained(base: "Assistant", folder: str | Path) -> "Assistant":
    """The model that an adapter was trained on, from the one that its run began with: the same cuts, grid and media.

    An adapter that peft wrote says nothing of these, and changes none. Raises ConfigError for a file that is damaged.
    """
    from perception_lm.training.build import _changed
    from perception_lm.training.run import ModelConfig

    folder = Path(folder)
    if not (folder / OURS).is_file():
        return base
    found = read_json(inside(folder, OURS), MAX_CONFIG, ConfigError)
    changes = found.get("changes", {})
    if not isinstance(changes, dict):
        raise ConfigError(f"{folder / OURS}: changes is {changes!r}; expected a table")
    given = {"init": "base", **changes}
    changed = _changed(base, read_settings(ModelConfig, given, f"{folder / OURS}, changes"))
    if "media" in found:
        changed.processor.media = MediaConfig.from_dict(found["media"])
    return changed


def base_of(folder: Path) -> str:
    """The model an adapter belongs to. Raises CheckpointError when it does not say."""
    base = read_json(folder / CONFIG, 2**20, CheckpointError).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG} does not name the model it belongs to (base_model_name_or_path)")
    return base


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: str | Path) -> None:
    """Fold a saved adapter into a model; peft is not needed for it.

    Raises CheckpointError for tensors that have no place, and for an adapter of another shape or kind.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, 2**20, CheckpointError)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    odd = [
        key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or odd:
        raise CheckpointError(
            f"{folder / CONFIG} is a {config.get('peft_type')!r} adapter with {odd}; expected plain LORA"
        )
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise CheckpointError(f"{folder / CONFIG}: r={rank!r}, lora_alpha={alpha!r}; expected numbers")
    state = open_checkpoint(folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    used = 0
    for key in state:
        name = key.removeprefix(PREFIX)
        if ".lora_B." in name:
            continue
        if ".lora_A." in name:
            name = name.replace(".lora_A", "")
            b_key = key.replace(".lora_A.", ".lora_B.")
            if b_key not in state:
                raise CheckpointError(f"{folder / WEIGHTS} has {key!r} and no {b_key!r}")
            used += 2
            change = state[b_key].float() @ state[key].float() * (alpha / rank)
        else:
            used, change = used + 1, None
        target = parameters.get(name)
        value = state[key] if change is None else change
        if target is None or target.shape != value.shape:
            what = "no such parameter" if target is None else f"{tuple(target.shape)} there, {tuple(value.shape)} here"
            raise CheckpointError(f"{folder / WEIGHTS} holds {key!r} for {name!r}: {what}; it is of another model")
        if change is None:
            target.copy_(value)
        else:
            target.copy_((target.float() + change.to(target.device)).to(target.dtype))
    if used != len(list(state)):
        raise CheckpointError(f"{folder / WEIGHTS} holds matrices without their other half")
