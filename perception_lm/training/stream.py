"""Samples to the passes of each step, in worker processes, from any position on."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from perception.errors import PerceptionError
from perception.training.order import Order
from perception_lm.training.examples import Example, Examples, NothingToLearn, Pack, join, pad, plan
from perception_lm.training.sources import Source

log = logging.getLogger(__name__)
Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Lost:
    """A sample that was left out. too_long: not its fault."""

    source: str
    index: int
    why: str
    too_long: bool


@dataclass
class Report:
    """What became of some samples."""

    samples: int = 0
    lost: list[Lost] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples become passes.

    batch    samples of a step, over all processes
    layout   "packed": samples end to end, at most `tokens` a pass; "padded": `rows` samples a pass, filled to seq_len
    tokens   of a packed pass
    rows     of a padded pass
    ahead    True: learn the lengths of a step's samples first, from headers, and decode pass by pass, for samples with
             many tiles. False: decode all samples of a step at once, for small ones
    workers  processes that prepare samples; 0: none but this one
    """

    batch: int
    layout: Layout = "packed"
    tokens: int = 8192
    rows: int = 1
    ahead: bool = False
    workers: int = 0


class Stream:
    """The passes of one process of `size`, step after step.

    Samples k, k + 1, ... k + batch - 1 of the order are a step; process `rank` takes every `size`-th of them. Nothing
    else decides what a step holds: neither workers nor processes nor how it is packed.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        order: Order,
        examples: Examples,
        config: StreamConfig,
        *,
        rank: int = 0,
        size: int = 1,
    ):
        self.config, self.rank, self.size = config, rank, size
        self.work = _Work(sources, order, examples, config)

    def steps(self, position: int = 0) -> "Iterator[Step]":
        """Endless; the first is the one that begins with sample `position`. Use up each before the next."""
        return self._ahead(position) if self.config.ahead else self._at_once(position)

    def _positions(self, position: int) -> Iterator[range]:
        while True:
            yield range(position + self.rank, position + self.config.batch, self.size)
            position += self.config.batch

    def _load(self, tasks: Iterator[Any], workers: int) -> Iterator[Any]:
        loader = DataLoader(
            self.work,
            batch_size=None,
            sampler=_Tasks(tasks),
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_quiet_worker if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        return iter(loader)

    def _at_once(self, position: int) -> "Iterator[Step]":
        tasks = (("step", list(share)) for share in self._positions(position))
        for packs, report in self._load(tasks, self.config.workers):
            yield Step(iter(packs), report)

    def _ahead(self, position: int) -> "Iterator[Step]":
        measured = self._load((("measure", list(s)) for s in self._positions(position)), min(1, self.config.workers))
        passes = self._load(self._passes(measured), self.config.workers)

        def step(report: Report) -> Iterator[Pack]:
            for pack, new, last in passes:
                report.samples += new.samples
                report.lost += new.lost
                if pack is not None:
                    yield pack
                if last:
                    return

        while True:
            report = Report()
            yield Step(step(report), report)

    def _passes(self, measured: Iterator[Any]) -> Iterator[Any]:
        config = self.config
        for positions, lengths, lost in measured:
            if config.layout == "packed":
                rows = plan(lengths, config.tokens)
            else:
                rows = [list(range(i, min(i + config.rows, len(lengths)))) for i in range(0, len(lengths), config.rows)]
            rows = rows or [[]]
            for number, row in enumerate(rows):
                last = number == len(rows) - 1
                yield "pass", [positions[i] for i in row], last, lost if last else []


@dataclass
class Step:
    """The passes of one step; `report` is whole once they were used up."""

    packs: Iterator[Pack]
    report: Report


class _Work(Dataset):
    """What a worker does, asked by task instead of by index."""

    def __init__(self, sources: Mapping[str, Source], order: Order, examples: Examples, config: StreamConfig):
        self.names, self.sources = list(sources), list(sources.values())
        self.order, self.examples, self.config = order, examples, config

    def __getitem__(self, task: Any) -> Any:
        kind, positions, *more = task
        report = Report()
        if kind == "measure":
            found = [(position, self._try(self.examples.length, position, report)) for position in positions]
            known = [(position, length) for position, length in found if length is not None]
            return [position for position, _ in known], [length for _, length in known], report.lost
        examples = [self._try(self.examples, position, report) for position in positions]
        examples = [example for example in examples if example is not None]
        report.samples = len(examples)
        if kind == "step":
            return self._packs(examples), report
        last, lost = more
        report.lost += lost
        return (self._joined(examples) if examples else None), report, last

    def _packs(self, examples: list[Example]) -> list[Pack]:
        if self.config.layout == "packed":
            return [join([examples[i] for i in row]) for row in plan(list(map(len, examples)), self.config.tokens)]
        return [self._joined(examples[i : i + self.config.rows]) for i in range(0, len(examples), self.config.rows)]

    def _joined(self, examples: Sequence[Example]) -> Pack:
        if self.config.layout == "packed":
            return join(examples)
        return pad(examples, self.examples.seq_len, self.examples.processor.tokenizer.pad)

    def _try(self, work: Any, position: int, report: Report) -> Any:
        place = self.order[position]
        source = self.sources[place.source]
        try:
            return work(source[place.index])
        except (PerceptionError, ValueError, OSError, RecursionError) as error:
            where = getattr(source, "where", lambda index: f"{self.names[place.source]}[{index}]")(place.index)
            too_long = isinstance(error, NothingToLearn)
            report.lost.append(Lost(self.names[place.source], place.index, f"{where}: {error}", too_long))
            return None


class _Tasks:
    def __init__(self, tasks: Iterator[Any]):
        self.tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return self.tasks


def _as_it_is(item: Any) -> Any:
    return item


def _quiet_worker(number: int) -> None:
    """A signal to the whole group is for the parent to handle, which ends its workers when it has saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
