"""Who is faster, and how near to what the machine can do: one process, the same work, in turn, beside a limit kernel.

Every round runs each contender and the limit kernel (a matrix product of the model's shape in the same dtype, or a
sweep over memory) until `LEAST` seconds are used, in an order that turns from round to round. A ratio is taken inside a
round and the median over the rounds counts, so what slows the whole machine for a while slows both sides. A round in
which the limit kernel is more than 20 % off its own median is dropped; fewer than seven good rounds are no result, and
a figure that rests on fewer always says on how many.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import RESULTS, clean, git, record, versions

Call = Callable[[], object]
Clock = Callable[[], float]

ROUNDS, GOOD = 9, 7  # rounds run, and good ones needed
LEAST = 0.2  # seconds of one sample
OFF = 0.2  # how far the limit kernel may be from its median
SLACK = 0.1  # by how much the lower quartile may miss what the median meets
# What performance gates were set on; `needs` of a gate names some of these.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A ratio that was promised.

    ours, peers  names of contenders; the fastest of the peers counts. No peers: the share of the limit that `ours` has
    least, aim   the ratio promised, and what a prototype showed to be possible
    needs        processor flags (or "AMD", "Intel") without which the promise was not made: then the ratio is reported
                 and not judged
    """

    what: str
    ours: str
    peers: tuple[str, ...] = ()
    least: float
    aim: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limit:
    """A kernel that does what the machine can, and how much of it: FLOPs or bytes a call."""

    run: Call
    work: float
    unit: str = "GFLOP/s"


@dataclass
class Rounds:
    """Seconds a call, of every round: of each contender, and of the limit kernel under the name "limit"."""

    seconds: dict[str, list[float]]
    work: dict[str, float] = field(default_factory=dict)
    limit: Limit | None = None

    @property
    def good(self) -> list[int]:
        """The rounds in which the limit kernel ran as it usually does."""
        count = len(next(iter(self.seconds.values()), []))
        if self.limit is None:
            return list(range(count))
        usual = statistics.median(self.seconds["limit"])
        return [index for index in range(count) if abs(self.seconds["limit"][index] / usual - 1) <= OFF]

    def of(self, name: str) -> list[float]:
        return [self.seconds[name][index] for index in self.good]

    def fastest(self, names: Iterable[str]) -> str | None:
        here = [name for name in names if name in self.seconds]
        return min(here, key=lambda name: statistics.median(self.of(name) or self.seconds[name]), default=None)

    def ratios(self, ours: str, peer: str) -> list[float]:
        """How many times as fast `ours` is, round by round."""
        return [theirs / mine for mine, theirs in zip(self.of(ours), self.of(peer), strict=True)]

    def shares(self, name: str) -> list[float]:
        """Which part of the limit's rate a contender reaches, round by round."""
        assert self.limit is not None
        rates = [self.limit.work / seconds for seconds in self.of("limit")]
        return [self.work[name] / mine / rate for mine, rate in zip(self.of(name), rates, strict=True)]


def race(
    contenders: Mapping[str, Call],
    limit: Limit | None = None,
    *,
    work: Mapping[str, float] | None = None,
    rounds: int = ROUNDS,
    least: float = LEAST,
    seconds: float = float("inf"),
    clock: Clock = time.perf_counter,
) -> Rounds:
    """Run all in turn. `work` is what one call of a contender does, in the limit's unit of work. No round begins after
    `seconds`."""
    calls = dict(contenders) | ({} if limit is None else {"limit": limit.run})
    for run in calls.values():
        start = clock()
        run()
        if clock() - start < 2 * least:  # a call of many samples' length has warmed what there is to warm
            run()
    found = Rounds({name: [] for name in calls}, dict(work or {}), limit)
    order, start = list(calls), clock()
    for index in range(rounds):
        if index and clock() - start >= seconds:
            break
        turned = order[index % len(order) :] + order[: index % len(order)]
        for name in turned:
            found.seconds[name].append(sample(calls[name], least, clock))
    return found


def sample(run: Call, least: float = LEAST, clock: Clock = time.perf_counter) -> float:
    """Seconds a call: repeated until `least` seconds have gone. The clock of a GPU waits for the GPU, so it is read at
    every eighth of the time at most."""
    start, calls, next_ones = clock(), 0, 1
    while True:
        for _ in range(next_ones):
            run()
        calls += next_ones
        used = clock() - start
        if used >= least:
            return used / calls
        next_ones = max(1, int(least / 8 / max(used / calls, 1e-9)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lower quartile, and the 10th and 90th percentile, to four digits."""
    marks = (("median", 0.5), ("p10", 0.1), ("p25", 0.25), ("p90", 0.9))
    return {name: float(f"{quantile(values, at):.4g}") for name, at in marks}


def quantile(values: Sequence[float], at: float) -> float:
    ordered, place = sorted(values), at * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def judge(
    gate: Gate, rounds: Rounds, flags: Iterable[str], left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The ratio, its spread and a verdict: met, missed, inconclusive, not judged here, or not run.

    `left_out` says why a contender did not run.
    """
    row: dict[str, Any] = {"what": gate.what, "gate": gate.least, "aim": gate.aim}
    peer = rounds.fastest(gate.peers)
    if gate.ours not in rounds.seconds or (gate.peers and peer is None):
        why = [f"{name}: {left_out[name]}" for name in (gate.ours, *gate.peers) if name in (left_out or {})]
        return {**row, "verdict": "not run", "why": "; ".join(why) or "a side of it did not run here"}
    values = rounds.ratios(gate.ours, peer) if peer else rounds.shares(gate.ours)
    row |= {"peer": peer or "limit", "rounds": len(next(iter(rounds.seconds.values()))), "good rounds": len(values)}
    if not values:
        return {**row, "verdict": "inconclusive", "why": "no good round"}
    row |= spread(values)
    if lacking := [need for need in gate.needs if need not in flags]:
        passed = row["median"] >= gate.least
        why = f"set for processors with {', '.join(gate.needs)}; lacking here: {', '.join(lacking)}"
        return {**row, "verdict": "not judged here", "why": why, "reached anyway": passed}
    verdict, why = judge_values(row, gate.least, len(values))
    return {**row, "verdict": verdict, **({"why": why} if why else {})}


def judge_values(found: Mapping[str, float], least: float, good: int) -> tuple[str, str]:
    if good < GOOD:
        return "inconclusive", f"{good} good rounds; {GOOD} are needed"
    if found["median"] < least:
        return "missed", ""
    if found["p25"] < least * (1 - SLACK):
        return "inconclusive", f"the lower quartile is {found['p25']}, more than {SLACK:.0%} below the gate"
    return "met", ""


def at_most(what: str, values: Sequence[float], limit: float, aim: float) -> dict[str, Any]:
    """A gate that is a ceiling (seconds, or a share of memory), over runs that have no limit kernel."""
    found = spread(values)
    verdict = "met" if found["median"] <= limit else "missed"
    if len(values) < 3:
        verdict = "inconclusive"
    return {"what": what, "gate": limit, "aim": aim, "at most": True, "runs": len(values), **found, "verdict": verdict}


def processor() -> dict[str, Any]:
    """Name and flags of the processor, and what torch makes of it."""
    import torch

    names, flags = [], set()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            names.append(line.split(":", 1)[1].strip())
        elif line.startswith("flags"):
            flags |= set(line.split(":", 1)[1].split())
    name = names[0] if names else "unknown"
    makers = [maker for maker in ("AMD", "Intel") if maker in name]
    return {
        "name": name,
        "flags": [flag for flag in FLAGS if flag in flags] + makers,
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }


def conditions(threads: int) -> dict[str, Any]:
    """What may explain a figure: when, by which code, on how busy a machine."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "clean": clean(),
        "threads": threads,
        "load average": round(os.getloadavg()[0], 2),
    }


def describe(
    rounds: Rounds, gates: Sequence[Gate], threads: int, *, left_out: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """One case, ready to be written down."""
    flags = processor()["flags"]
    contenders: dict[str, Any] = {}
    for name in rounds.seconds:
        if name != "limit":
            contenders[name] = {"ms": spread([1e3 * seconds for seconds in rounds.of(name) or rounds.seconds[name]])}
            if rounds.limit is not None and rounds.work.get(name) and rounds.good:
                contenders[name]["share of limit"] = spread(rounds.shares(name))
    count, good = len(next(iter(rounds.seconds.values()), [])), len(rounds.good)
    case: dict[str, Any] = {**conditions(threads), "rounds": count, "good rounds": good, "contenders": contenders}
    if rounds.limit is not None:
        rates = [1e-9 * rounds.limit.work / seconds for seconds in rounds.seconds["limit"]]
        case["limit"] = {"unit": rounds.limit.unit, **spread(rates)}
    case |= more | ({"left out": dict(left_out)} if left_out else {})
    return case | {"gates": [judge(gate, rounds, flags, left_out) for gate in gates]}


def show(name: str, case: Mapping[str, Any]) -> None:
    """A case for the eyes."""
    limit = f"   limit {case['limit']['median']:.4g} {case['limit']['unit']}" if "limit" in case else ""
    threads = f", {case['threads']} threads" if case["threads"] else ""
    print(f"\n{name}{threads}{limit}{few(case)}")
    for contender, found in case.get("contenders", {}).items():
        share = f"   {found['share of limit']['median']:.2f}" if "share of limit" in found else ""
        print(f"  {contender:44} {found['ms']['median']:10.2f} ms{share}")
    for contender, why in case.get("left out", {}).items():
        print(f"  {contender:44} {why}")
    for row in case.get("gates", []):
        print(f"  {in_words(row)}")
    sys.stdout.flush()


def in_words(row: Mapping[str, Any]) -> str:
    value = f"{row['median']:.2f}{few(row)} [{row['p10']:.2f}-{row['p90']:.2f}]" if "median" in row else "-"
    against = f" / {row['peer']}" if "peer" in row else ""
    return f"{row['what']}{against}: {value}, gate {row['gate']} ({row['aim']}): {row['verdict']}"


def few(row: Mapping[str, Any]) -> str:
    """ " (3 rounds)" behind a figure that rests on fewer than `GOOD` of them, whatever its verdict."""
    for key, word in (("good rounds", "round"), ("runs", "run")):
        count = row.get(key, GOOD)
        if count < GOOD:
            return f" ({count} {word}{'s' * (count != 1)})"
    return ""


@dataclass
class Options:
    """What the command line of every script says."""

    quick: bool
    threads: list[int]
    rounds: int
    least: float
    seconds: float  # after which no round of a case begins
    only: str
    save: bool

    def wants(self, case: str) -> bool:
        return self.only in case


def options(text: str | None, arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="few cases, short samples, two threads; nothing is written"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="one after the other; by default 1, then 2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--seconds", type=float, help="after which no further round of a case begins; 600, or 5 with --quick"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-save", action="store_true", help="print, and write nothing")
    given = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    threads = given.threads or ([min(2, cores)] if given.quick else sorted({1, min(2, cores)}))
    rounds, least, seconds = (GOOD, 0.05, 5.0) if given.quick else (given.rounds, LEAST, 600.0)
    seconds = seconds if given.seconds is None else given.seconds
    return Options(given.quick, threads, rounds, least, seconds, given.only, not (given.quick or given.no_save))


def save(name: str, method: str | None, cases: Mapping[str, Mapping[str, Any]], chosen: Options) -> None:
    """Write cases to `results/NAME.json`; other cases that are there already stay, with the conditions they ran in."""
    if not chosen.save or not cases:
        return
    import json

    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text("utf-8")).get("cases", {}) if path.is_file() else {}
    facts = {"method": method, "processor": processor(), "peers": versions(("timm", "open_clip_torch", "transformers"))}
    print(record(name, {**facts, "settings": asdict(chosen), "cases": {**before, **cases}}))
