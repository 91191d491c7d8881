"""Which index for so many vectors and so much memory and time; how well it finds what an exact search finds.

faiss (Douze et al. 2024, arXiv:2401.08281) has the indexes; what is here is the arithmetic of choosing among them.

n rows  C width  L lists (nlist)  Q queries
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from perception.errors import ConfigError

log = logging.getLogger(__name__)
Kind = Literal["flat", "ivf-flat", "ivf-sq8", "ivf-pq", "hnsw"]
TRAINING_ROWS = (39, 64)  # of each list: what faiss asks for, and what is given where there are as many
PQ_ROWS = 256 * 39
LINKS = 32  # of a node of the HNSW graph
HNSW_ROWS = 2_000_000  # beyond, building the graph takes hours
RESCORE = 8  # candidates per result that are scored again with the stored vectors, where codes are rounded
DEFAULT_LATENCY = 0.05
TARGET_RECALL = 0.95


@dataclass(frozen=True)
class Choice:
    """An index, and how hard it searches.

    kind     "flat" is exact; "ivf-*" look through a few of L lists; "hnsw" walks a graph
    lists    L
    code     bytes of a vector's code; 0 for the vector itself
    effort   lists looked through (nprobe), or breadth of the walk (efSearch)
    rescore  candidates per result whose stored vectors are read for the exact score; 0: codes are exact
    why      in words
    limit    bytes a search may keep in memory, copies of rows included; None: no limit
    """

    kind: Kind
    lists: int = 0
    code: int = 0
    effort: int = 0
    rescore: int = 0
    why: str = ""
    limit: int | None = None

    def spare(self, rows: int, width: int) -> int | None:
        """Bytes that copies of rows may take, beside `bytes`; None: no limit."""
        return None if self.limit is None else max(0, self.limit - self.bytes(rows, width))

    def bytes(self, rows: int, width: int) -> int:
        """What a search keeps in memory; an exact one keeps copies of rows too where there is memory to spare."""
        if self.kind == "flat":
            return 4 * rows * width
        if self.kind == "hnsw":
            return rows * (4 * width + 4 * (2 * LINKS + LINKS // 8) + 8)
        return rows * ((self.code or 4 * width) + 8) + 4 * self.lists * width

    def factory(self, width: int) -> str:
        """The name faiss's `index_factory` knows it by."""
        names = {"ivf-flat": "Flat", "ivf-sq8": "SQ8", "ivf-pq": f"PQ{self.code}x8"}
        return f"IVF{self.lists},{names[self.kind]}" if self.kind in names else f"HNSW{LINKS},Flat"


def candidates(rows: int, width: int) -> list[Choice]:
    """Every index worth considering for so many rows, most accurate first."""
    found = [Choice("flat")]
    lists = list_count(rows)
    if lists < 4:
        return found
    found.append(Choice("ivf-flat", lists))
    if rows <= HNSW_ROWS:
        found.append(Choice("hnsw"))
    found.append(Choice("ivf-sq8", lists, width, rescore=RESCORE))
    codes = [code for code in range(width // 2, 0, -1) if width % code == 0 and code <= 128]
    if rows >= PQ_ROWS:
        found += [Choice("ivf-pq", lists, code, rescore=RESCORE) for code in codes]
    return found


def list_count(rows: int) -> int:
    """L, a power of two near 4 sqrt(n), fewer where there would not be enough vectors to train each."""
    if rows < 1:
        return 0
    return min(2 ** round(math.log2(4 * math.sqrt(rows))), 2 ** int(math.log2(max(1, rows // TRAINING_ROWS[0]))))


def choose(
    rows: int,
    width: int,
    *,
    kind: str = "auto",
    max_memory: int | None = None,
    max_latency: float | None = None,
    bandwidth: Callable[[], float] | None = None,
) -> Choice:
    """The index for n rows of C numbers: exact where memory and time allow it.

    max_memory   bytes a search may keep in memory; None: no limit
    max_latency  seconds of one query; None stands for 0.05 where it decides between exact and not
    bandwidth    bytes a second that this machine reads from memory; measured when it matters

    Raises ConfigError when no index fits, with the least that does.
    """
    check_budget(kind=kind)
    possible = candidates(rows, width)
    if kind != "auto":
        if chosen := [one for one in possible if one.kind == kind and _fits(one, rows, width, max_memory)]:
            return replace(chosen[0], why="asked for")
        if any(one.kind == kind for one in possible):
            raise ConfigError(_too_large([one for one in possible if one.kind == kind], rows, width, max_memory))
        log.warning("%d rows are too few to train %s; the search is exact instead", rows, kind)
        return Choice("flat", why=f"{rows} rows are too few to train {kind}")
    fitting = [one for one in possible if _fits(one, rows, width, max_memory)]
    if not fitting:
        raise ConfigError(_too_large(possible, rows, width, max_memory))
    if fitting[0].kind == "flat":
        size, budget = fitting[0].bytes(rows, width), max_latency or DEFAULT_LATENCY
        speed = (bandwidth or read_speed)() if size > 2**22 else 1e9
        seconds = size / speed
        if seconds <= budget:
            why = f"exact: {show_bytes(size)} are read in about {1e3 * seconds:.1f} ms"
            return replace(fitting[0], why=why)
        fitting = fitting[1:] or fitting
        slow = f"exact search would take about {1e3 * seconds:.0f} ms of {1e3 * budget:.0f}"
    else:
        slow = f"exact search would need {show_bytes(4 * rows * width)} of {show_bytes(max_memory or 0)}"
    if (max_latency or DEFAULT_LATENCY) < 0.005 and any(one.kind == "hnsw" for one in fitting):
        return replace(next(one for one in fitting if one.kind == "hnsw"), why=f"{slow}; a graph is the quickest")
    return replace(fitting[0], why=f"{slow}; the most accurate that fits")


def check_budget(
    *,
    kind: str = "auto",
    max_memory: str | int | None = None,
    max_latency: float | None = None,
    target_recall: float = TARGET_RECALL,
    queries: Any = None,
) -> None:
    """Raises ConfigError for what cannot be asked of any index."""
    if kind not in ("auto", *get_args(Kind)):
        raise ConfigError(f"kind={kind!r}; choose from auto, {', '.join(get_args(Kind))}")
    parse_bytes(max_memory)
    if not 0 < target_recall <= 1:
        raise ConfigError(f"target_recall={target_recall}; expected more than 0, 1 at most")
    if max_latency is not None and not max_latency > 0:
        raise ConfigError(f"max_latency={max_latency}; expected seconds, more than 0")


def _fits(one: Choice, rows: int, width: int, max_memory: int | None) -> bool:
    return max_memory is None or one.bytes(rows, width) <= max_memory


def _too_large(possible: Sequence[Choice], rows: int, width: int, max_memory: int | None) -> str:
    least = min(possible, key=lambda one: one.bytes(rows, width))
    return (
        f"max_memory={show_bytes(max_memory or 0)} is too little for {rows} vectors of {width}; "
        f"the smallest ({least.kind}) needs {show_bytes(least.bytes(rows, width))}"
    )


def read_speed() -> float:
    """Bytes a second."""
    from perception.kernels.probe import read_bandwidth

    return 1e9 * read_bandwidth(64 << 20)


def parse_bytes(given: str | int | float | None) -> int | None:
    """`"8GB"`, `"500 MB"` or a number of bytes. Raises ConfigError for anything else."""
    if given is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    text = str(given).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    try:
        size = float(number) * units[unit]
        if not 0 < size < 2**63:
            raise ValueError
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{given!r} is no amount of memory; write it as '8GB' or a number of bytes") from error
    return int(size)


def show_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# --- how well it finds -----------------------------------------------------------------------------------------------


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The mean share of the exact answers that were found. found, wanted: Q k rows, -1 for none."""
    shares = [len(set(f) & set(w) - {-1}) / max(1, len(set(w) - {-1})) for f, w in zip(found, wanted, strict=True)]
    return float(np.mean(shares)) if shares else 1.0


def efforts(choice: Choice) -> list[int]:
    """How hard to search, from least to most."""
    if choice.kind == "hnsw":
        return [16, 32, 64, 128, 256, 512, 1024]
    return [2**power for power in range(int(math.log2(max(1, choice.lists))) + 1)]


@dataclass(frozen=True)
class Trial:
    """What one effort gives: recall of the set of queries that does worst, of each set, and seconds of one query."""

    effort: int
    recall: float
    seconds: float
    sets: Mapping[str, float]


def tune(
    choice: Choice,
    score: Callable[[int], Mapping[str, float]],
    one: Callable[[int], Any],
    *,
    target_recall: float,
    max_latency: float | None,
) -> tuple[Choice, list[Trial]]:
    """The least effort that reaches the recall; less where the latency budget ends before.

    score  effort -> recall of each set of queries
    one    effort -> anything; a single query, to be timed
    """
    trials: list[Trial] = []
    for effort in efforts(choice):
        sets = {name: round(share, 4) for name, share in score(effort).items()}
        trials.append(Trial(effort, min(sets.values()), time_of(functools.partial(one, effort)), sets))
        if trials[-1].recall >= target_recall or (max_latency is not None and trials[-1].seconds > max_latency):
            break
    allowed = [t for t in trials if max_latency is None or t.seconds <= max_latency] or trials[:1]
    reached = [t for t in allowed if t.recall >= target_recall]
    chosen = reached[0] if reached else max(allowed, key=lambda t: (t.recall, -t.effort))
    if not reached:
        log.warning(
            "recall %.3f, not the %.3f asked for: %s at effort %d is what memory and time allow",
            chosen.recall,
            target_recall,
            choice.kind,
            chosen.effort,
        )
    return replace(choice, effort=chosen.effort), trials


def time_of(run: Callable[[], Any], times: int = 5) -> float:
    """The median of a few runs, in seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return sorted(found)[times // 2]
