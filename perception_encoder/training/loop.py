"""A training loop that can be stopped at any moment and continues as if it had not been.

All randomness of a step comes from a generator seeded with the run's seed and the step's number, so a resumed run takes
the same steps as one that never stopped.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perception.errors import CheckpointError
from perception.files import atomic_write, sweep_temporaries
from perception_encoder.training.optim import warmup_stable_decay

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
# One step's losses, or parts of its batch that are computed on their own and whose losses add up to the step's.
StepLoss = Callable[[torch.Generator], Losses | list[Callable[[], Losses]]]
STATE = "state.pt"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how fast, how often.

    steps        optimizer steps in all
    warmup       steps until the learning rate is full
    decay        last steps, over which it goes to zero
    clip         largest length of the gradient
    average      decay of the running average of the weights
    workers      threads that share the parts of a batch, where the losses come in parts; the sum does not depend on it
    save_every   seconds between checkpoints
    log_every    steps between lines of the log
    """

    steps: int
    warmup: int = 0
    decay: int = 0
    clip: float = 1.0
    average: float = 0.998
    workers: int = 1
    seed: int = 0
    save_every: float = 120.0
    log_every: int = 20


class Loop:
    """Steps of `losses`, whose sum is minimised, with a running average of the weights and whole checkpoints.

    module      holds every parameter that learns
    optimizers  over the module's parameters; their learning rates are multiplied by the schedule
    losses      generator -> named losses; it draws every random number from the generator it is given
    folder      where state.pt and log.jsonl are

    In a process group of several, losses that come in parts are shared among the processes; each holds the whole module
    and makes the same steps, and the first writes.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        losses: StepLoss,
        config: LoopConfig,
        folder: str | Path,
    ):
        self.module, self.optimizers, self.losses = module, list(optimizers), losses
        self.config, self.folder = config, Path(folder)
        self.average = deepcopy(module).requires_grad_(False)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.step, self.seconds = 0, 0.0
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.size: int = dist.get_world_size() if dist.is_initialized() else 1
        self._stop = threading.Event()  # what all processes know
        self._threads: ThreadPoolExecutor | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(self.folder)
        if (self.folder / STATE).is_file():
            self.load()

    def run(self) -> bool:
        """Train to the end. False when SIGTERM or SIGINT came first; what was done is saved either way."""
        start = saved = time.monotonic()
        before, first = self.seconds, self.step
        with stop_on_signal() as stopped:
            while self.step < self.config.steps and not self._stop.is_set():
                values = self.advance(stopped.is_set())
                if self.size == 1 and stopped.is_set():
                    break
                self.seconds = before + time.monotonic() - start
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    pace = (self.step - first) / (time.monotonic() - start)
                    self._log(
                        {"step": self.step, "seconds": round(self.seconds, 1), "steps_s": round(pace, 3), **values}
                    )
                if time.monotonic() - saved > self.config.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        return self.step >= self.config.steps

    def advance(self, stop: bool = False) -> dict[str, float]:
        """One step. Returns the losses as numbers.

        stop  this process wants it to be the last; all of them learn of it
        """
        config = self.config
        factor = warmup_stable_decay(self.step, config.steps, config.warmup, config.decay)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self.module.train()
        losses = self.losses(torch.Generator().manual_seed(config.seed * 1_000_003 + self.step))
        values = self._backward(losses) if isinstance(losses, dict) else self._backward_parts(losses)
        if self.size > 1:
            stop = self._together(values, stop, shared=not isinstance(losses, dict))
        if stop:
            self._stop.set()
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"the loss is not a number at step {self.step}: {values}")
        nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(config.average, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        return {name: round(value, 4) for name, value in values.items()}

    @staticmethod
    def _backward(losses: Losses) -> dict[str, float]:
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.item() for name, loss in losses.items()}

    def _backward_parts(self, parts: list[Callable[[], Losses]]) -> dict[str, float]:
        """Gradients of all parts, added in their order whichever thread made them first: the same bits every time.

        Threads take the next part when they are free, so a core that is busy elsewhere slows only its own part down.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]

        def work(part: Callable[[], Losses]) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
            losses = part()
            total = torch.stack(list(losses.values())).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            return {name: loss.item() for name, loss in losses.items()}, gradients

        values: dict[str, float] = {}
        mine = parts[self.rank :: self.size]
        for losses, gradients in map(work, mine) if self.config.workers == 1 else self._pool().map(work, mine):
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + value
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return values

    def _together(self, values: dict[str, float], stop: bool, shared: bool) -> bool:
        """Add up what the processes made of their parts, gradients and losses; whether one of them wants to stop."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None] if shared else []
        numbers = torch.tensor([*(values.values() if shared else ()), float(stop)])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
        dist.all_reduce(flat)
        *sums, rest = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        if shared:
            values.update(zip(values, rest.tolist(), strict=False))
        return bool(rest[-1] > 0)

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            # One core a thread: the threads are the parallelism.
            self._threads = ThreadPoolExecutor(self.config.workers, initializer=torch.set_num_threads, initargs=(1,))
        return self._threads

    def save(self) -> None:
        if self.rank:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.config.seed,
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_write(self.folder / STATE) as file:
            torch.save(state, file)

    def load(self) -> None:
        """Raises CheckpointError when the state is of another run."""
        state: dict[str, Any] = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        if state["seed"] != self.config.seed or len(state["optimizers"]) != len(self.optimizers):
            raise CheckpointError(f"{self.folder / STATE} is of another run; give another folder or remove it")
        try:
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            raise CheckpointError(f"{self.folder / STATE} is of another model: {error}") from error
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        log.info("%s: continuing at step %d", self.folder.name, self.step)

    def _log(self, line: dict[str, Any]) -> None:
        if self.rank:
            return
        log.info("%s %s", self.folder.name, " ".join(f"{k}={v}" for k, v in line.items()))
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process; only in the main thread."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
