"""The loop: passes to gradients to a step, on one process or many; a run that was stopped continues as it would have.

What a step learns from depends on its number alone: samples by their position, random numbers by seed, step, pass and
process. The loss is a sum over what is learned, divided at the end of the step by how much that was, wherever it was
computed; so packing, accumulation and the number of processes change nothing but the rounding.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from perception.errors import CheckpointError, ConfigError, PerceptionError
from perception.settings import check_range
from perception.training.distributed import World, is_sharded, whole_tensor
from perception.training.files import differences
from perception.training.metrics import Metrics, peak_flops, peak_memory
from perception.training.order import mix
from perception.training.state import Checkpoints, KeepConfig, load_tensors, read_facts, tensor_shapes

log = logging.getLogger(__name__)


class Loss(NamedTuple):
    """What a task returns for a pass.

    total   []   the sum of the losses of everything that is learned in it
    weight       how much that was: tokens, samples
    flops        operations, forward and backward; 0 when nobody counted
    """

    total: Tensor
    weight: float
    flops: float = 0.0


class Passes(Protocol):
    """The passes of a step. `report` has `samples` and `lost` (what was left out, `too_long` or bad)."""

    packs: Iterator[Any]
    report: Any


class Data(Protocol):
    """What a run learns from. `steps` gives every step from a position on; `empty` a pass with nothing to learn."""

    def steps(self, position: int) -> Iterator[Any]: ...
    def empty(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, and what when it goes wrong.

    steps       optimizer steps in all
    batch       samples of a step, over all processes
    seed        of everything random that is not data
    clip        largest length of the gradient; 0: no limit
    average     decay of a running average of the weights, kept beside them; 0: none
    patience    steps in a row that teach nothing, as their loss or gradient is no number or none of their samples can
                be learned from: each is skipped, after so many the run stops
    max_bad     bad rows that are passed over; one more and the run stops
    log_every   steps between lines of the record
    stop_after  seconds after which the run saves and stops, to be continued; 0: none
    """

    steps: int
    batch: int
    seed: int = 0
    clip: float = 1.0
    average: float = 0.0
    patience: int = 10
    max_bad: int = 0
    log_every: int = 1
    stop_after: float = 0.0
    keep: KeepConfig = field(default_factory=KeepConfig)
    tensorboard: bool = True


def check_adamw(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, clip: float) -> None:
    """ConfigError naming the key of a run file's [optimizer] that cannot be. torch takes some, and the loss climbs."""
    check_range("optimizer.lr", lr, 0, 1000)
    for beta in betas:
        check_range("optimizer.betas", beta, 0, 1 - 1e-9)
    check_range("optimizer.eps", eps, 0, 1)
    check_range("optimizer.weight_decay", weight_decay, 0, 1000)
    check_range("optimizer.clip", clip, 0, 10**9)


class Stopped(PerceptionError, RuntimeError):
    """A run that cannot go on as it is; its state is saved."""


class Trainer:
    """Steps of a task.

    task        pass -> Loss; holds every parameter that learns
    optimizers  over the task's parameters; their rates are multiplied by `schedule`
    data        `Data`
    schedule    step -> factor; step 0 is the first
    folder      metrics.jsonl and checkpoints/
    world       the processes, when there are several; parameters are sharded over them, or each holds the same copy
    facts       what else a checkpoint should say; `fingerprints` in it are compared when a run is resumed
    after_step  called by every process with the trainer and the step's line; what it adds to the line is recorded
    """

    def __init__(
        self,
        task: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        data: Data,
        config: TrainerConfig,
        folder: str | Path,
        *,
        schedule: Callable[[int], float] = lambda step: 1.0,
        world: World | None = None,
        facts: Mapping[str, Any] | None = None,
        save_frozen: bool = True,
        after_step: Callable[["Trainer", dict[str, Any]], None] | None = None,
        progress: bool | None = None,
    ):
        self.task, self.optimizers, self.data, self.config = task, list(optimizers), data, config
        self.folder, self.schedule, self.world = Path(folder), schedule, world or World()
        self.facts, self.save_frozen, self.after_step = dict(facts or {}), save_frozen, after_step
        self.progress = progress
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep, self.world)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.learned = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.step = self.position = self.skipped = 0
        self._begin_failures()
        self.named_long = False  # whether a sample that is too long was named already
        self.seconds = self.tokens = 0.0
        self.bad: set[tuple[str, int]] = set()  # rows, of all processes
        self.bad_rows = 0
        self.last_bad = ""  # why this process left out the last of them
        self.averages = {n: p.detach().clone() for n, p in self.learned.items()} if config.average else {}

    # --- running ---

    def run(self) -> bool:
        """Train to the end, from the newest checkpoint if there is one. False when it was told to stop first.

        What was done is saved either way. Raises Stopped when too many steps in a row teach nothing, or all of them,
        and when too many rows are bad; CheckpointError when nothing can be saved.
        """
        self.resume()
        record = None
        if self.world.first:
            record = Metrics(
                self.folder,
                steps=self.config.steps,
                step=self.step,
                tensorboard=self.config.tensorboard,
                bar=self.progress,
            )
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        try:
            with stop_on_signal() as told, torch.random.fork_rng(devices=devices):
                return self._run(told, record)
        finally:
            if record is not None:
                record.close()

    def _run(self, told: threading.Event, record: Metrics | None) -> bool:
        began, before, saved = time.monotonic(), self.seconds, time.monotonic()
        saved_step, keep, trouble = self.step, self.config.keep, 0
        steps = self.data.steps(self.position) if self.step < self.config.steps else iter(())
        while self.step < self.config.steps:
            line = self.advance(steps)
            now = time.monotonic()
            self.seconds = before + now - began
            line["seconds"] = round(self.seconds, 3)
            if self.after_step is not None:
                self.after_step(self, line)
            if record is not None:
                if self.recorded:
                    record.write(line)
                record.advance(self.step, loss=f"{line['loss']:.4g}")
            late = bool(self.config.stop_after) and now - began > self.config.stop_after
            stop, due = self.world.largest(
                [float(told.is_set() or late), float(bool(keep.minutes) and now - saved > 60 * keep.minutes)]
            )
            if (why := self._reason_to_stop()) is not None:
                self.save()
                raise Stopped(f"{why}; the state is saved in {self.checkpoints.path(self.step)}")
            if stop:
                break
            if self.step < self.config.steps and (due or (keep.steps and self.step % keep.steps == 0)):
                try:
                    self.save()
                    saved_step, trouble = self.step, 0
                except CheckpointError as error:
                    # The run is worth more than one checkpoint: the disk may have room again.
                    if (trouble := trouble + 1) >= 3:
                        raise
                    log.warning("%s; training goes on", error)
                saved = time.monotonic()
        if saved_step != self.step or self.checkpoints.latest() is None:
            self.save()
        done = self.step >= self.config.steps
        if done and self.skipped >= self.step:
            why = f"nothing was learned in {self.skipped} of {self.step} steps{self._details()}"
            raise Stopped(f"{why}; the state is saved in {self.checkpoints.path(self.step)}")
        return done

    def rehearse(self, steps: Iterator[Any]) -> dict[str, Any]:
        """`advance` of a step that is thrown away. Raises ConfigError when nothing was learned in it."""
        line = self.advance(steps)
        if self.failures:
            raise ConfigError(f"the first step taught nothing{self._details()}")
        return line

    @property
    def recorded(self) -> bool:
        """Whether the step that was just made is one that the record tells of."""
        return self.step % self.config.log_every == 0 or self.step == self.config.steps

    def advance(self, steps: Iterator[Any]) -> dict[str, Any]:
        """One step: all its passes, and what the optimizers make of them. Returns what the record says of it."""
        factor, began = self.schedule(self.step), time.monotonic()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self.task.train()
        passes = next(steps)
        sums = {"loss": 0.0, "weight": 0.0, "flops": 0.0, "tokens": 0.0, "waited": time.monotonic() - began}
        for number, (item, last) in enumerate(self._together(passes.packs, sums)):
            torch.manual_seed(mix(self.config.seed, self.step, number, self.world.rank) >> 1)
            if (sync := getattr(self.task, "set_requires_gradient_sync", None)) is not None:
                sync(last)  # gradients travel once a step
            loss = self.task(item)
            loss.total.backward()
            sums["loss"] += float(loss.total.detach())
            sums["weight"] += loss.weight
            sums["flops"] += loss.flops
            sums["tokens"] += float(getattr(item, "tokens", item).numel()) if loss.weight else 0.0
        line = self._finish(sums, passes.report)
        self.step += 1
        self.position += self.config.batch
        took = time.monotonic() - began
        return {
            "step": self.step,
            **line,
            "lr": self.rates[0][0] * factor,
            "position": self.position,
            "tokens_s": round(line["tokens"] / took, 1),
            "samples_s": round(line["samples"] / took, 2),
            **self._speed(sums["flops"], took),
            "data_s": round(sums["waited"], 4),
            "step_s": round(took, 4),
        }

    def _together(self, packs: Iterator[Any], sums: dict[str, float]) -> Iterator[tuple[Any, bool]]:
        """Each pass, and whether it is the step's last. Processes that run out go on with empty passes."""

        def following() -> Any:
            began = time.monotonic()
            item = next(packs, None)
            sums["waited"] += time.monotonic() - began
            return item

        item = following()
        more = self.world.any(item is not None)
        while more:
            ahead = following()
            more = self.world.any(ahead is not None)
            yield (self.data.empty() if item is None else item), not more
            item = ahead

    def _finish(self, sums: dict[str, float], report: Any) -> dict[str, Any]:
        """Gradients of sums to the step: divided by what was learned, cut to length, applied if they are numbers."""
        new = {(bad.source, bad.index) for bad in report.lost if not bad.too_long} - self.bad
        for bad in report.lost:
            if bad.too_long and not self.named_long:
                log.warning("left out %s (others like it are counted as too_long, and not named)", bad.why)
                self.named_long = True
            else:
                log.log(logging.DEBUG if bad.too_long else logging.WARNING, "left out %s", bad.why)
                self.last_bad = self.last_bad if bad.too_long else bad.why
        long = sum(bad.too_long for bad in report.lost)
        totals = [sums["loss"], sums["weight"], sums["tokens"], float(report.samples), float(len(new)), float(long)]
        loss, weight, tokens, samples, fresh, long_all = self.world.total(totals)
        if fresh:  # the same number everywhere, so all gather or none; a row counts once, whoever meets it again
            new = set().union(*self.world.gather(new))
            self.bad |= new
            self.bad_rows += len(new)
        self.tokens += tokens
        mean, norm = loss / weight if weight else 0.0, 0.0
        if weight:
            norm = self._scale_gradients(self.world.size / weight)
        if sound := bool(weight) and math.isfinite(mean) and math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_averages()
            self._begin_failures()
        else:
            self.skipped += 1
            self.failures += 1
            self.long += int(long_all)
            for bad in report.lost:
                self.reasons.setdefault(bad.too_long, bad.why)
            if weight:
                self.number = f"loss {mean}, gradient {norm}"
            log.warning("step %d is skipped: %s", self.step + 1, self.number if weight else "nothing to learn in it")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return {
            "loss": mean,
            "grad_norm": norm,
            "learned": int(weight),
            "tokens": int(tokens),
            "samples": int(samples),
            **({"too_long": int(long_all)} if long_all else {}),
            **({"bad_rows": self.bad_rows} if self.bad_rows else {}),
            **({} if sound else {"skipped": self.skipped}),
        }

    def _scale_gradients(self, factor: float) -> float:
        """Multiply all gradients, then shorten them to `clip`. Returns their length between the two."""
        for parameter in self.learned.values():
            if parameter.grad is None:  # nothing of this step reached it; it decays as if all of it had said 0
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.learned.values() if p.grad is not None]
        # Sharding has averaged them on the way; copies of a parameter have each their own process's gradient so far.
        self.world.average([gradient for gradient in gradients if not is_sharded(gradient)])
        torch._foreach_mul_(gradients, factor)
        norm = float(whole_tensor(nn.utils.get_total_norm(gradients)))
        if self.config.clip and math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, self.config.clip / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def _update_averages(self) -> None:
        if self.averages:
            # A short memory at first: the start should not be remembered for as long as the middle.
            decay = min(self.config.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.averages.values()), list(self.learned.values()), 1 - decay)

    def _reason_to_stop(self) -> str | None:
        if self.failures >= self.config.patience:
            return f"nothing was learned in {self.failures} steps in a row{self._details()}"
        if self.bad_rows > self.config.max_bad:
            last = f", the last of them {self.last_bad}" if self.last_bad else ""
            return f"{self.bad_rows} bad rows; max_bad allows {self.config.max_bad} (each was named above{last})"
        return None

    def _begin_failures(self) -> None:
        """What is known of the steps since the last that taught something."""
        self.failures = self.long = 0
        self.number = ""  # the last loss and gradient that were none
        self.reasons: dict[bool, str] = {}  # whether too long -> why the first such sample was left out

    def _details(self) -> str:
        """Why the last steps taught nothing, as the end of a message."""
        found = [self.number] if self.number else []
        if self.long:
            such = f", such as {self.reasons[True]}" if True in self.reasons else ""
            found.append(f"{self.long} samples too long{such}")
        if False in self.reasons:
            found.append(self.reasons[False])
        return f": {'; '.join(found)}" if found else ""

    def _speed(self, flops: float, took: float) -> dict[str, Any]:
        (flops,) = self.world.total([flops])
        peak = peak_flops(self.world.device)
        mfu = {} if peak is None or not flops else {"mfu": round(flops / took / peak / self.world.size, 4)}
        return {**mfu, "tflops": round(flops / took / 1e12, 4), "memory": peak_memory(self.world.device)}

    # --- state ---

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: parameters, averages, the optimizers' memory."""
        shown = self.learned if not self.save_frozen else dict(self.task.named_parameters())
        found = {f"model.{name}": p.detach() for name, p in shown.items()}
        found |= {f"model.{name}": b for name, b in _saved_buffers(self.task)}
        found |= {f"average.{name}": tensor for name, tensor in self.averages.items()}
        names = {p: name for name, p in self.learned.items()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                found |= {f"optim.{names[parameter]}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        return found

    def save(self) -> Path:
        """Write a checkpoint. All processes call it together. Raises CheckpointError when it cannot be written."""
        facts = {
            **self.facts,
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "failures": self.failures,
            "bad_rows": self.bad_rows,
            "bad": sorted(set().union(*self.world.gather(self.bad))),
            "seed": self.config.seed,
            "frozen": self.save_frozen,
        }
        return self.checkpoints.save(self.step, self.tensors(), facts)

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False when there is none.

        Raises CheckpointError for one of another model.
        """
        path = self.checkpoints.latest()
        if path is None:
            return False
        facts = read_facts(path)
        self._load(path)
        self.step, self.position = int(facts["step"]), int(facts["position"])
        self.seconds, self.tokens = float(facts["seconds"]), float(facts["tokens"])
        self.skipped, self.bad_rows = int(facts["skipped"]), int(facts["bad_rows"])
        # A run that was stopped for its failures gets another chance when somebody starts it again.
        self._begin_failures()
        self.bad = {(str(source), int(index)) for source, index in facts["bad"]}
        if self.world.first:
            for name, known in facts.get("fingerprints", {}).items():
                if (now := self.facts.get("fingerprints", {}).get(name)) != known:
                    log.warning("%s has changed since step %d: %s, now %s", name, self.step, known, now)
            if changed := differences(facts.get("run", {}), _plain(self.facts.get("run", {}))):
                log.warning("settings that are not those of step %d: %s", self.step, ", ".join(changed))
            log.info("continuing at step %d of %d", self.step, self.config.steps)
        return True

    def _load(self, path: Path) -> None:
        known = tensor_shapes(path)
        wanted = self.tensors()
        names, memory = dict(self.learned), {}
        for key, (shape, dtype) in known.items():
            if key.startswith("optim."):
                name, _, part = key.removeprefix("optim.").rpartition(".")
                if name not in names:
                    raise CheckpointError(f"{path} remembers {name!r}, which does not learn here; give another folder")
                p = names[name]
                memory[name, part] = torch.zeros_like(p, dtype=dtype) if shape == p.shape else torch.zeros(shape)
                if shape != p.shape:
                    memory[name, part] = memory[name, part].to(dtype)
        wanted = {key: t for key, t in wanted.items() if not key.startswith("optim.")}
        wanted |= {f"optim.{name}.{part}": tensor for (name, part), tensor in memory.items()}
        load_tensors(path, wanted, self.world)
        owners = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        fused = {id(o): any(g.get("fused") or g.get("capturable") for g in o.param_groups) for o in self.optimizers}
        for (name, part), tensor in memory.items():
            p = names[name]
            if tensor.ndim == 0 and fused[id(owners[p])]:
                tensor = tensor.to(p.device)
            owners[p].state[p][part] = tensor


def _saved_buffers(task: nn.Module) -> Iterable[tuple[str, Tensor]]:
    kept = task.state_dict().keys()
    return [(name, buffer) for name, buffer in task.named_buffers() if name in kept]


def _plain(settings: Mapping[str, Any]) -> Any:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process. A second one puts the old handler back;
    the same signal once more ends the process."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if told.is_set():
            signal.signal(number, before[number])
        log.warning("told to stop: saving after this step")
        told.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
