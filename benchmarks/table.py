"""The promises and what came of them, as one table: from `results/*.json` to `results/TABLE.md` and into the README.

python benchmarks/table.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
README = ROOT / "README.md"
ORDER = ("encoder", "text", "pixels", "tiling", "decode", "load", "import_time", "first_image", "lm_loss", "retrieval")


def rows(results: Path = RESULTS) -> dict[str, dict[int, dict[str, Any]]]:
    """Every gate there is a result of: what it is about -> threads -> row; threads 0: they mean nothing there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    files = sorted(results.glob("*.json"), key=lambda file: (_place(file.stem), file.stem))
    for file in files:
        content = json.loads(file.read_text("utf-8"))
        cases = content.get("cases", {}) if isinstance(content, dict) else {}
        for case in cases.values() if isinstance(cases, Mapping) else ():
            for row in case.get("gates", ()) if isinstance(case, Mapping) else ():
                found.setdefault(row["what"], {})[case.get("threads") or 0] = row
    return found


def render(results: Path = RESULTS) -> str:
    """The table in Markdown."""
    names = sorted({name for file in results.glob("*.json") if (name := _processor(file))})
    lines = [
        f"Measured on {'; '.join(names) or 'nothing yet'}. A cell is the median over the rounds of one run; spread",
        "and conditions are in `benchmarks/results`. *not judged*: the gate was set for processors with instructions",
        "that this one lacks; the ratio is what it is here. *inconclusive*: fewer than seven good rounds, or too wide",
        "a spread.",
        "",
        "| what | gate (aim) | 1 thread | 2 threads |",
        "|---|--:|--:|--:|",
    ]
    for what, cells in rows(results).items():
        one, two = cells.get(1) or cells.get(0), cells.get(2)
        row = next(iter(cells.values()))
        gate = f"{'≤ ' if row.get('at most') else ''}{row['gate']} ({row['aim']})"
        lines.append(f"| {what} | {gate} |{_cell(one)}|{_cell(two)}|")
    return "\n".join(lines) + "\n"


def in_readme(readme: str, results: Path = RESULTS) -> str:
    """The README with the table between its two marks. ValueError where they are not."""
    if START not in readme or END not in readme:
        raise ValueError(f"README.md has no place for the table: put {START} and {END} on lines of their own")
    head, rest = readme.split(START, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{START}\n{render(results)}{END}{tail}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return " "
    verdict = {"missed": "**missed**", "not judged here": "*not judged*"}.get(row["verdict"], row["verdict"])
    return f" {row['median']:.2f} {verdict} " if "median" in row else f" {verdict} "


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _processor(file: Path) -> str | None:
    content = json.loads(file.read_text("utf-8"))
    found = content.get("processor") if isinstance(content, dict) else None
    return f"{found['name']} ({found['torch uses']})" if found and "torch uses" in found else (found or {}).get("name")


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
