"""The `perception` command. Verbs come from the upper packages through the entry-point group `perception.commands`."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from perception.errors import ConfigError, LimitError, PerceptionError

GROUP = "perception.commands"
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h: a fault of ours, not of the input

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16")]


def build() -> typer.Typer:
    """The application with every verb that is installed."""
    app = typer.Typer(
        name="perception",
        help="Vision encoders and vision-language models: features, zero-shot, retrieval, generation.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_version)
    app.command("doctor")(doctor)
    for found in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            register: Callable[[typer.Typer], None] = found.load()
        except Exception as error:  # the others still work, `doctor` among them, which says what is broken
            note(f"without the verbs of {found.value}, which does not load: {error}; see `perception doctor`")
            continue
        register(app)
    return app


def main() -> None:
    """Run the command. Every error is one line on stderr: exit 1 for input or memory, 2 for usage, 70 for our fault."""
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")  # the usual one shows source besides
    try:
        build()(prog_name="perception")
    except (TypeError, KeyError, IndexError) as error:  # what a user wrote raises none of these: a slip of ours does
        _fail(error, INTERNAL_ERROR)
    except (PerceptionError, ValueError, LookupError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `perception models | head`: the reader has what it wanted
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  so that the flush at exit does not fail again
            raise SystemExit(0) from None
        _fail(error, 1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        _fail(error, INTERNAL_ERROR)


def doctor(
    speed: Annotated[bool, typer.Option("--speed", help="Measure the machine and the models on it instead.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="A model to measure; give it again for more.")] = None,
    as_json: Json = False,
) -> None:
    """Versions, devices and extras on this machine, and the fix for each that does not work."""
    from perception import doctor as checks

    if speed or model:
        from perception import speed as measured

        limit = measured.limits()
        rows = [measured.reached(case, limit) for case in measured.cases(model or ())]
        show(measured.as_json(limit, rows), as_json, lambda: measured.report(limit, rows))
        return

    found = checks.diagnose()
    show(checks.as_json(found), as_json, lambda: checks.report(found))
    if not checks.healthy(found):
        raise typer.Exit(1)


def show(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """The result on stdout: JSON, or text for people."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text())


def note(message: str) -> None:
    """A remark on stderr, so that stdout stays what was asked for."""
    typer.echo(message, err=True)


def check_picture(out: Path) -> None:
    """ConfigError when no picture can be written under this name."""
    from PIL import Image

    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--out {out} has no picture suffix; use .png")


def table(rows: list[list[str]], header: list[str]) -> str:
    """Rows in columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from perception import __version__

        typer.echo(f"perception-vision {__version__}")
        raise typer.Exit


def _fail(error: BaseException, code: int) -> None:
    if os.environ.get("PERCEPTION_DEBUG"):
        raise error
    # torch's own is told by its name: importing torch here would cost every command a second.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        error, code = LimitError(f"out of memory; try a smaller --batch-size or another --device ({why})"), 1
    kind = "error" if code == 1 else f"internal error ({type(error).__name__})"
    detail = error.args[0] if isinstance(error, KeyError) and error.args else error
    note(f"{kind}: {detail}")
    if code == INTERNAL_ERROR:
        note("this is a fault of perception-vision; PERCEPTION_DEBUG=1 shows where")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
