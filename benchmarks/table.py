"""The promises and what came of them, as one table: from `results/*.json` to `results/TABLE.md` and into the README.

python benchmarks/table.py
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import few
from record import RESULTS, ROOT

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
README = ROOT / "README.md"
ORDER = ("encoder", "text", "pixels", "tiling", "decode", "load", "import_time", "first_image", "lm_loss", "retrieval")


KERNELS = ("gpu_attention",)  # kernels one by one: a row in the README as soon as one of them ran

NOTES = """\
A cell is the median over the rounds of one run; spread and conditions are in `benchmarks/results`. *(3 rounds)*: it
rests on so many good ones, fewer than the seven of a verdict (three, where whole processes are the runs). *not judged*:
the gate was set for processors with instructions that this one lacks; the ratio is what it is here. *inconclusive*: too
few good rounds, or too wide a spread. *not run*: a side of it did not run here, or nobody measured it with so many
threads. Where threads are left alone (files, whole processes, a GPU) the figure stands in the first column.
"""
PEERS = """\
*Best peer* is the fastest in `encoder.py`; *published transform* (`pixels.py`), *plain Pillow* (`tiling.py`) and *usual
pattern* (`load.py`) are the published algorithm, written plainly. *N class prompts* of the text row: 64, or fewer where
open_clip would take longer than 10 s, as in bfloat16 on a processor that has none.
"""


def rows(results: Path = RESULTS, short: bool = False) -> dict[str, dict[int, dict[str, Any]]]:
    """Every gate there is a result of: what it is about -> threads -> row; threads 0: they mean nothing there.

    short  without the kernels that did not run
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, _, case in _cases(results):
        for row in case["gates"]:
            if short and name in KERNELS and "median" not in row:
                continue
            found.setdefault(row["what"], {})[case.get("threads") or 0] = row
    return found


def render(results: Path = RESULTS, short: bool = False) -> str:
    """The table in Markdown; `short` as in `rows`."""
    lines = ["| what | gate (aim) | 1 thread | 2 threads |", "|---|--:|--:|--:|"]
    for what, cells in rows(results, short).items():
        row = next(iter(cells.values()))
        gate = f"{'≤ ' if row.get('at most') else ''}{row['gate']} ({row['aim']})"
        columns = (_cell(cells[0]), "-") if 0 in cells else (_cell(cells.get(1)), _cell(cells.get(2)))
        lines.append(f"| {what} | {gate} | {' | '.join(columns)} |")
    return "\n".join([NOTES, *lines, "", measured_on(results), "", PEERS])


def measured_on(results: Path = RESULTS) -> str:
    """Machines, and what was installed on them, in one line: of the files that hold a figure."""
    machines, ours, peers = set(), set(), set()
    for _, content, case in _cases(results):
        if any("median" in row for row in case["gates"]):
            machines |= {_machine(content)} | {found["device"] for found in [case.get("gpu")] if found}
            ours |= _packages(content.get("versions", {}))
            peers |= _packages(content.get("peers", {})) | _packages(case.get("versions of", {}))
    if not machines:
        return "Measured on nothing yet."
    software = ", ".join(sorted(ours)), ", ".join(sorted(peers - ours))
    return f"Measured on {'; '.join(sorted(machines))}. " + "; peers: ".join(filter(None, software)) + "."


def in_readme(readme: str, results: Path = RESULTS) -> str:
    """The README with the table between its two marks. ValueError where they are not."""
    if START not in readme or END not in readme:
        raise ValueError(f"README.md has no place for the table: put {START} and {END} on lines of their own")
    head, rest = readme.split(START, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{START}\n{render(results, short=True)}{END}{tail}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not run"
    verdict = {"missed": "**missed**", "not judged here": "*not judged*"}.get(row["verdict"], row["verdict"])
    return f"{row['median']:.2f}{few(row)} {verdict}" if "median" in row else f"{verdict}{few(row)}"


def _cases(results: Path) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every case that has gates, with its file's name and whole content."""
    for file in sorted(results.glob("*.json"), key=lambda file: (_place(file.stem), file.stem)):
        content = json.loads(file.read_text("utf-8"))
        cases = content.get("cases", {}) if isinstance(content, dict) else {}
        for case in cases.values() if isinstance(cases, Mapping) else ():
            if isinstance(case, Mapping) and "gates" in case:
                yield file.stem, content, case


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _machine(content: Mapping[str, Any]) -> str:
    found = content.get("processor", {})
    name = content.get("machine") or found.get("name", "an unknown machine")
    known = [found["torch uses"]] if "torch uses" in found else []
    known += [flag for flag in found.get("flags", ()) if flag.islower()]  # its maker stands in the name
    return f"{name} ({', '.join(known)})" if known else name


def _packages(versions: Mapping[str, str]) -> set[str]:
    return {f"{name} {version}" for name, version in versions.items() if version != "not installed"}


def main() -> None:
    from perception.files import atomic_write

    with atomic_write(RESULTS / "TABLE.md") as temporary:
        temporary.write_text(render(), "utf-8")
    readme = README.read_text("utf-8")
    if START in readme:
        with atomic_write(README) as temporary:
            temporary.write_text(in_readme(readme), "utf-8")
    print(render())


if __name__ == "__main__":
    main()
