"""What a run file of `perception train-encoder` may say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from perception.errors import ConfigError
from perception.settings import check_range
from perception.training.distributed import EngineConfig
from perception.training.files import find_run, read_run, read_toml, ready_runs
from perception.training.state import KeepConfig
from perception.training.trainer import check_adamw
from perception_encoder.training.probe import STRENGTHS

RUNS = Path(__file__).parent / "runs"
Task = Literal["contrastive", "classify", "spatial"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a run starts from.

    init         a name, hub id or folder; with `fresh`, of the sizes only
    fresh        begin with new weights
    learn        regular expressions of the names of what learns, such as "vision" or "vision[.]blocks[.]5"; a text
                 tower that is left out is a frozen target
    drop_last    blocks of the vision tower that go before training
    layer_scale  start of the gains of the tower's blocks, where it has none
    """

    init: str
    fresh: bool = False
    learn: tuple[str, ...] = ("",)
    drop_last: int = 0
    layer_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Pictures and their captions or labels.

    source    a folder of pictures (with .txt beside each, or one folder a class), a .csv, .tsv or .jsonl file of rows,
              or a .tar of files that share a stem
    root      the folder that rows' pictures are in, and stay in; the file's own by default
    image     the column of the picture
    text      the column of the caption, of several captions (a list), or of the label
    crop      the smallest part of a picture's area that a random crop keeps; 1: the whole picture always
    flip      how often a picture is mirrored
    workers   threads that read and decode
    max_bad   share of the rows that may be unreadable
    """

    source: str
    root: str | None = None
    image: str = "image"
    text: str = "text"
    crop: float = 1.0
    flip: float = 0.0
    workers: int = 4
    max_bad: float = 0.001

    def __post_init__(self) -> None:
        check_range("data.crop", self.crop, 0.01, 1)
        check_range("data.flip", self.flip, 0, 1)
        check_range("data.workers", self.workers, 1, 1024)
        check_range("data.max_bad", self.max_bad, 0, 1)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised; a weight of 0 leaves a part out.

    contrastive   CLIP's loss, with the texts and pictures of all processes as negatives
    teacher       a model whose picture embeddings the tower learns to predict, by a linear map that is thrown away
    features      weight of that, 1 - cosine
    relations     weight of ranking the batch as the teacher does
    layer         spatial: which block of the frozen copy is the teacher; counted from 0, or from the end
    similarity    spatial: weight of the tokens' similarities to each other, beside their own direction
    smooth        classify: label smoothing
    """

    contrastive: float = 1.0
    teacher: str | None = None
    features: float = 0.0
    relations: float = 0.0
    layer: int = -3
    similarity: float = 1.0
    smooth: float = 0.1

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.features == 0 and self.relations == 0):
            raise ConfigError("loss.teacher goes with loss.features or loss.relations; give both or neither")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; vectors are not decayed.

    layer_decay   the rate of a block is this power of its distance from the top; 1: all alike
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_adamw(self.lr, self.betas, self.eps, self.weight_decay, self.clip)
        check_range("optimizer.layer_decay", self.layer_decay, 0.01, 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A linear warm-up of `warmup` steps, then half a cosine down to `floor` of the full rate."""

    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_range("schedule.warmup", self.warmup, 0, 10**12)
        check_range("schedule.floor", self.floor, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of a training run, as its file says it. Relative paths are taken from where the command runs.

    batch        samples of a step, over all processes
    average      decay of a running average of the weights, which is what is kept at the end; 0: none
    log_every    steps between lines of the record
    stop_after   seconds after which it saves and stops, to be continued; 0: none
    tensorboard  write the record for TensorBoard, too, where that is installed
    """

    out: str
    task: Task
    steps: int
    batch: int
    model: ModelConfig
    data: PairsConfig
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    average: float = 0.0
    log_every: int = 1
    stop_after: float = 0.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 10**12)
        check_range("batch", self.batch, 1, 10**9)
        check_range("log_every", self.log_every, 1, 10**9)
        check_range("average", self.average, 0, 1)
        check_range("stop_after", self.stop_after, 0, 10**9)
        if not 0 <= self.schedule.warmup < self.steps:
            raise ConfigError(f"schedule.warmup={self.schedule.warmup}; expected 0 to less than steps={self.steps}")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Whose features a probe looks at.

    init   a name, hub id or folder of a tower
    layer  the mean of this block's patches, counted from 0, or from the end; when not given what the tower's pool says,
           or the mean of the last patches where it has none
    """

    init: str
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Pictures and their labels: `source`, `root`, `image`, `text`, `workers` and `max_bad` as in `PairsConfig`.

    validation  the rows that choose the strength, a source like the other; `held_out` of the rows when not given
    """

    source: str
    validation: str | None = None
    held_out: float = 0.2
    root: str | None = None
    image: str = "image"
    text: str = "text"
    workers: int = 4
    max_bad: float = 0.001

    def __post_init__(self) -> None:
        check_range("data.held_out", self.held_out, 0.001, 0.999)
        self.pairs(self.source)

    def pairs(self, source: str) -> PairsConfig:
        own = {name: getattr(self, name) for name in ("root", "image", "text", "workers", "max_bad")}
        return PairsConfig(source=source, **own)


@dataclass(frozen=True, kw_only=True)
class ProbeRun:
    """A linear probe (task = "probe"): nothing of the tower learns, so there are no steps.

    batch      pictures at a time
    kind       "ridge" or "logistic", see `linear_probe`
    strengths  of the regularisation; the best on the held-out rows is kept
    """

    out: str
    task: Literal["probe"]
    model: FeaturesConfig
    data: LabelsConfig
    batch: int = 64
    seed: int = 0
    device: str = "auto"
    kind: Literal["ridge", "logistic"] = "ridge"
    strengths: tuple[float, ...] = STRENGTHS

    def __post_init__(self) -> None:
        check_range("batch", self.batch, 1, 10**6)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run | ProbeRun:
    """A run file, with values of the command line over it; those of the package go by their names (`run_names()`).

    Raises ConfigError for what is no run file.
    """
    path = find_run(path, RUNS)
    if read_toml(path).get("task") == "probe":
        return read_run(ProbeRun, path, overrides)
    return read_run(Run, path, overrides)


def run_names() -> list[str]:
    """The run files that come with the package."""
    return ready_runs(RUNS)
