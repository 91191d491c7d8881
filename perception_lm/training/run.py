"""A run file to a trained model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from perception.errors import ConfigError
from perception.settings import check_range
from perception.training.distributed import EngineConfig, World, shard
from perception.training.files import find_run, read_run, ready_runs
from perception.training.order import Order
from perception.training.state import KeepConfig
from perception.training.trainer import Trainer, TrainerConfig, check_adamw
from perception_lm.assistant import Assistant
from perception_lm.config import DecoderConfig, MediaConfig
from perception_lm.losses import IGNORE
from perception_lm.processor import MediaOptions, Tiling
from perception_lm.training.examples import Examples, Form, Pack
from perception_lm.training.freeze import learn_only
from perception_lm.training.schedule import Schedule, factor
from perception_lm.training.sources import SourceConfig, as_source, fingerprints, open_source
from perception_lm.training.stream import Layout, Stream, StreamConfig
from perception_lm.training.task import AnswerTask, units
from perception_lm.training.tower import add_drop_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a run starts from: a whole model, or its parts.

    init         a name, hub id or folder of a whole model: an earlier stage's
    encoder      a name, hub id or folder of a tower; with it `decoder`, and `tokenizer` when the decoder has none
    decoder      a name, hub id or folder, or the sizes of a fresh one
    image_size   of a tile; the tower's positions are stretched to it
    depth        blocks of the tower that stay
    layer_scale  start of the gains of the tower's blocks, where it has none
    drop_path    stochastic depth of the tower while it learns
    projector    "pooling" or "pixel_shuffle"
    pool         patches along one side of the square that becomes one token
    plain_rope   forget the decoder's stretch of positions to long contexts, as the published 8B does
    learn        parts that learn: encoder, projector, decoder, or regular expressions of parameter names
    """

    init: str | None = None
    encoder: str | None = None
    decoder: str | DecoderConfig | None = None
    tokenizer: str | None = None
    image_size: int | None = None
    depth: int | None = None
    layer_scale: float | None = None
    drop_path: float = 0.0
    projector: Literal["pooling", "pixel_shuffle"] = "pooling"
    pool: int | None = None
    plain_rope: bool = False
    learn: tuple[str, ...] = ("encoder", "projector", "decoder")

    def __post_init__(self) -> None:
        for name, most in (("image_size", 65_536), ("depth", 1024), ("pool", 64)):
            if (value := getattr(self, name)) is not None:
                check_range(f"model.{name}", value, 1, most)
        check_range("model.drop_path", self.drop_path, 0, 0.99)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from, and how it is shown.

    datasets   a TOML or JSON file of sources by name, beside `sources`
    mix        name -> weight of the sources to use; all, by their size, when empty
    form       "chat", or "warmup": picture, caption, line break
    seq_len    tokens of a sample
    layout     "packed", or "padded"
    tokens     of a packed pass; seq_len when 0
    rows       of a padded pass
    ahead      decode pass by pass instead of step by step: for samples of many tiles
    max_bad    share of all rows that may be bad
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    datasets: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    form: Form = "chat"
    seq_len: int = 11_520
    layout: Layout = "packed"
    tokens: int = 0
    rows: int = 1
    ahead: bool = False
    shuffle: bool = True
    workers: int = 0
    max_bad: float = 0.001
    tiling: Tiling | None = None
    max_tiles: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        check_range("data.seq_len", self.seq_len, 2, 2**24)
        check_range("data.max_bad", self.max_bad, 0, 1)
        check_range("data.workers", self.workers, 0, 1024)
        check_range("data.rows", self.rows, 1, 65_536)
        if self.max_tiles is not None:
            check_range("data.max_tiles", self.max_tiles, 1, 1024)
        if self.frames is not None:
            check_range("data.frames", self.frames, 1, 65_536)
        if self.tokens and self.tokens < self.seq_len:
            raise ConfigError(f"data.tokens={self.tokens} is less than a sample's seq_len={self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. `decay` falls on everything that learns, norms and biases too, as published, unless `decay_vectors` is
    false."""

    lr: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_vectors: bool = True
    clip: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_adamw(self.lr, self.betas, self.eps, self.weight_decay, self.clip)
        for part, rate in self.rates.items():
            check_range(f"optimizer.rates.{part}", rate, 0, 10**6)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time, in parts of its full height.

    kind    how it falls; `schedule.factor` has them all
    warmup  steps on the way up from 0
    floor   share of the full rate at the end
    decay   steps of the fall at the end, of "wsd" (a tenth of all when 0) and "trapezoid"
    """

    kind: Schedule = "cosine"
    warmup: int = 0
    floor: float = 0.01
    decay: int = 0

    def __post_init__(self) -> None:
        check_range("schedule.warmup", self.warmup, 0, 10**12)
        check_range("schedule.floor", self.floor, 0, 1)
        check_range("schedule.decay", self.decay, 0, 10**12)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) on the linear layers whose whole names match.

    targets  regular expressions of module names, such as "decoder[.]blocks[.].*[.]attn[.][qv]"
    rank     of the two matrices beside each
    alpha    their product counts alpha / rank

    Frozen weights keep the dtype of their files where engine.precision is "bf16"; otherwise they are float32, twice the
    size of published ones. What learns is float32 in every run.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("lora.targets is empty; name the linear layers that learn")
        check_range("lora.rank", self.rank, 1, 65_536)
        check_range("lora.alpha", self.alpha, 1e-6, 10**6)
        check_range("lora.dropout", self.dropout, 0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of a training run, as its file says it.

    out          the folder it is kept in, taken from where the command runs; relative paths of models and data are
                 taken from there, too
    batch        samples of a step, over all processes
    average      decay of a running average of the weights, which is what is kept at the end; 0: none
    patience     steps in a row that teach nothing (no number as loss or gradient, no sample that fits) until it stops
    log_every    steps between lines of the record
    stop_after   seconds after which it saves and stops, to be continued; 0: none
    save_frozen  write what does not learn into checkpoints, too; without it they need the model the run began with
    export       layouts of the model that is written at the end: native, original, hf; tower is its vision tower alone
    """

    out: str
    steps: int
    batch: int
    seed: int = 777
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    lora: LoraConfig | None = None
    average: float = 0.0
    patience: int = 10
    log_every: int = 1
    stop_after: float = 0.0
    save_frozen: bool = True
    export: tuple[Literal["native", "original", "hf", "tower"], ...] = ("native",)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 10**12)
        check_range("batch", self.batch, 1, 10**9)
        check_range("log_every", self.log_every, 1, 10**9)
        check_range("patience", self.patience, 1, 10**9)
        check_range("average", self.average, 0, 1)
        check_range("stop_after", self.stop_after, 0, 10**9)
        if not 0 <= self.schedule.warmup < self.steps:
            raise ConfigError(f"schedule.warmup={self.schedule.warmup}; expected 0 to less than steps={self.steps}")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A run file, with values of the command line over it; ready-made ones go by their names (`run_names()`).

    Raises ConfigError for what is no run file.
    """
    return read_run(Run, find_run(path, RUNS), overrides)


RUNS = Path(__file__).parent / "runs"


def run_names() -> list[str]:
    """The run files that come with the package."""
    return ready_runs(RUNS)


# --- putting it together ---------------------------------------------------------------------------------------------


def make_trainer(
    run: Run,
    world: World | None = None,
    *,
    assistant: Assistant | None = None,
    sources: Mapping[str, Any] | None = None,
    after_step: Any = None,
    progress: bool | None = None,
) -> Trainer:
    """The trainer of a run, its model and data in place.

    assistant  a model to start from, in place of the run file's; it is changed
    sources    name -> samples, beside those that the run file names: lists of rows, or objects asked by number
    after_step called with the trainer and the record's line after every step

    Raises what reading the model and the data raises.
    """
    from perception_lm.training.build import build_assistant

    world = world or World()
    torch.manual_seed(run.seed)
    assistant = assistant or build_assistant(run, world.device)
    trained_on(assistant, run)
    model = (assistant.model if frozen_as_stored(run) else assistant.model.float()).to(world.device)
    if run.lora is not None:
        from perception_lm.training.lora import add_lora

        add_lora(model, run.lora)
    learn_only(model, (*run.model.learn, *([r".*\.lora_[AB]\..*"] if run.lora else [])))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps are too small for half of the digits
    if run.model.drop_path:
        add_drop_path(cast(nn.Module, model.encoder), run.model.drop_path)
    found = find_sources(run.data, sources)
    data = _Data(run, assistant, found, world)
    task = AnswerTask(
        model,
        checkpointing=run.engine.checkpointing,
        together=world.size > 1,
        tile=assistant.processor.media.tile,
    )
    if run.engine.compile:
        for unit in units(model):
            unit.compile(dynamic=True)
    shard(task, units(model), run.engine, world)
    rows = sum(len(source) for source in found.values())
    return Trainer(
        task,
        [make_optimizer(task, run.optimizer)],
        data,
        TrainerConfig(
            steps=run.steps,
            batch=run.batch,
            seed=run.seed,
            clip=run.optimizer.clip,
            average=run.average,
            patience=run.patience,
            max_bad=int(run.data.max_bad * rows),
            log_every=run.log_every,
            stop_after=run.stop_after,
            keep=run.keep,
        ),
        run.out,
        schedule=lambda step: factor(run.schedule.kind, step, run.steps, **_shape(run.schedule)),
        world=world,
        facts=_facts(run, assistant, found),
        save_frozen=run.save_frozen,
        after_step=after_step,
        progress=progress,
    )


def _shape(schedule: ScheduleConfig) -> dict[str, Any]:
    return {"warmup": schedule.warmup, "floor": schedule.floor, "decay": schedule.decay}


def frozen_as_stored(run: Run) -> bool:
    """Whether frozen weights keep the dtype of their files: beside adapters, where passes are half as precise anyway.

    What learns is float32 in every run.
    """
    return run.lora is not None and run.engine.precision == "bf16"


def trained_on(assistant: Assistant, run: Run) -> None:
    """The media a model is trained with become its own: what it answers with, and what is saved with it."""
    data, processor = run.data, assistant.processor
    old = processor.media
    processor.media = MediaConfig(
        tile=old.tile,
        max_tiles=old.max_tiles if data.max_tiles is None else data.max_tiles,
        frames=old.frames if data.frames is None else data.frames,
        tiling=old.tiling if data.tiling is None else data.tiling,
        context=data.seq_len,
    )


def find_sources(data: DataConfig, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Name -> source, of those the mix names. Raises ConfigError for a mix of names that are not there."""
    configs = source_configs(data)
    given = dict(given or {})
    names = list(data.mix) or [*configs, *given]
    if strange := [name for name in names if name not in configs and name not in given]:
        raise ConfigError(f"data.mix names {strange}; there are {sorted({*configs, *given})}")
    if not names:
        raise ConfigError("the run has no data: give data.sources, or data.datasets and data.mix")
    return {name: as_source(given[name]) if name in given else open_source(configs[name], Path()) for name in names}


def source_configs(data: DataConfig) -> dict[str, SourceConfig]:
    """What the run file and its datasets file say of sources, by name."""
    from perception_lm.training.datasets import read_datasets

    return {**(read_datasets(data.datasets) if data.datasets else {}), **data.sources}


def _weights(data: DataConfig, sources: Mapping[str, Any]) -> list[float]:
    """What the mix says, else the source's own; where nobody gives a weight, each source's number of samples.

    Raises ConfigError when some have a weight and others have none: a share beside a million samples would be nothing.
    """
    own = {name: config.weight for name, config in source_configs(data).items() if config.weight is not None}
    given = {**own, **data.mix}
    if (without := [name for name in sources if name not in given]) and len(without) < len(sources):
        raise ConfigError(
            f"no weight for {', '.join(without)}, where other sources have one; give all of them, or none"
        )
    return [given.get(name, float(len(source))) for name, source in sources.items()]


class _Data:
    """The stream of a run, as the trainer takes it."""

    def __init__(self, run: Run, assistant: Assistant, sources: Mapping[str, Any], world: World):
        data = run.data
        if run.batch < world.size:
            raise ConfigError(f"batch={run.batch} samples for {world.size} processes; expected one each at least")
        options = MediaOptions(tiling=data.tiling, max_tiles=data.max_tiles, frames=data.frames)
        self.examples = Examples(processor=assistant.processor, seq_len=data.seq_len, form=data.form, options=options)
        sizes = [len(source) for source in sources.values()]
        order = Order(sizes, _weights(data, sources), seed=run.seed, shuffle=data.shuffle)
        config = StreamConfig(
            batch=run.batch,
            layout=data.layout,
            tokens=data.tokens or data.seq_len,
            rows=data.rows,
            ahead=data.ahead,
            workers=data.workers,
        )
        self.stream = Stream(sources, order, self.examples, config, rank=world.rank, size=world.size)
        self.pad = assistant.tokenizer.pad

    def steps(self, position: int) -> Any:
        return self.stream.steps(position)

    def empty(self) -> Pack:
        return Pack(torch.full((1, 1), self.pad), torch.full((1, 1), IGNORE), (1,))


def make_optimizer(task: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what learns; `rates` multiply the rate of the parts they name ("encoder", "projector", "decoder")."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.removeprefix("model.").split(".")[0]
        used.add(part)
        decay = config.weight_decay if config.decay_vectors or parameter.ndim >= 2 else 0.0
        groups.setdefault((config.lr * float(config.rates.get(part, 1.0)), decay), []).append(parameter)
    if strange := sorted(set(config.rates) - used):
        raise ConfigError(f"optimizer.rates names {strange}; what learns is {sorted(used)}")
    listed = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    return torch.optim.AdamW(listed, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _facts(run: Run, assistant: Assistant, sources: Mapping[str, Any]) -> dict[str, Any]:
    from perception_lm.training.export import describe_model

    return {
        "format": "perception-lm-training",
        "version": 1,
        "run": asdict(run),
        "model": describe_model(assistant, run),
        "fingerprints": fingerprints(sources),
    }
