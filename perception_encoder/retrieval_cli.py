"""The verbs of retrieval: embed, index, search."""

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from perception.cli import Device, Dtype, Json, note, show, table
from perception.errors import ConfigError
from perception_encoder import cli
from perception_encoder.cli import DEFAULT_MODEL, NANO_NOTE, BatchSize, ConfigFile, Model

Sources = Annotated[
    list[str],
    typer.Argument(help="Pictures, folders, *.tar, *.parquet, videos, or *.txt with a text a line; of one kind."),
]
IndexFolder = Annotated[Path, typer.Argument(help="The folder of an index.")]
OnError = Annotated[str | None, typer.Option(help="An input that cannot be read: raise (stop), skip, or log.")]
PartRows = Annotated[int, typer.Option(min=1, help="Rows of a part: what a kill can cost.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that read and resize.")]
Vectors = Annotated[str, typer.Option("--vectors", help="float32 or float16, on disk.")]
FileList = Annotated[Path | None, typer.Option("--files", help="A text file with one picture file a line.")]
Video = Annotated[
    str | None, typer.Option(help="Videos: frames (the default), or clips of several frames that make one vector.")
]
Fps = Annotated[float | None, typer.Option(help="Frames a second, of --video frames; 1 by default.")]
Seconds = Annotated[float | None, typer.Option(help="Length of a clip, of --video clips; 10 by default.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a clip, of --video clips; 8 by default.")]
ImageColumn = Annotated[str | None, typer.Option(help="Parquet: the column of pictures or their paths.")]
TextColumn = Annotated[str | None, typer.Option(help="Parquet: the column of captions.")]
IdColumn = Annotated[str | None, typer.Option(help="Parquet: the column of ids.")]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="Parquet: a column to keep; may repeat.")]
Texts = Annotated[bool, typer.Option("--texts", help="Parquet: embed the texts, not the pictures.")]
Memory = Annotated[str | None, typer.Option(help="What a search may keep in memory, such as 8GB.")]
Latency = Annotated[float | None, typer.Option(min=0.001, help="Milliseconds of one query.")]
Recall = Annotated[float, typer.Option(help="Share of the 10 nearest that must be found.")]
Kind = Annotated[
    str,
    typer.Option(
        help="auto; flat: exact; ivf-flat, ivf-sq8, ivf-pq: lists of vectors whole, in 8 bits a number, or "
        "in fewest bytes; hnsw: a graph."
    ),
]
IndexModel = Annotated[
    str | None, typer.Option("--model", help="The model of an index that does not name one, or names one elsewhere.")
]
Fast = Annotated[bool, typer.Option("--fast", help="Use this machine's fastest operators (perception.optimize).")]


# Options that only parts have, and that only embedding has; names that are not those of their flags.
OF_SOURCES = {"video", "fps", "seconds", "frames", "image_column", "text_column", "id_column", "keep", "texts"}
OF_PARTS = OF_SOURCES | {"engine", "processes", "gpus", "part_rows", "vectors", "file_format"}
OF_EMBEDDING = OF_SOURCES | {"batch_size", "on_error", "part_rows", "vectors", "workers"}
FLAGS = {"file_format": "format"}
# Endings of files: a folder by such a name is none that its reader can open.
FILES = {
    *(".npy", ".npz", ".pt", ".pth", ".safetensors", ".bin", ".pkl", ".h5", ".hdf5", ".parquet", ".arrow", ".faiss"),
    *(".json", ".jsonl", ".csv", ".tsv", ".txt", ".html", ".zip", ".tar"),
}
KINDS = {"text": "lines of text", "tar": "tars", "parquet": "Parquet", "video": "videos"}


class _BuildByDefault(TyperGroup):
    """`perception index photos/` is `perception index build photos/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["build", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    app.command("embed")(embed)
    app.command("search")(search)
    group = typer.Typer(cls=_BuildByDefault, no_args_is_help=True, help="Build, change and look into search indexes.")
    for verb in (build, add, delete, merge, report, duplicates, clusters, export):
        group.command(verb.__name__)(verb)
    group.command("import")(import_)
    app.add_typer(group, name="index")


def embed(
    context: typer.Context,
    sources: Sources = [],  # noqa: B006 - typer copies it
    out: Annotated[
        Path, typer.Option("--out", "-o", help="One .safetensors file for pictures, or a folder for parts.")
    ] = Path("embeddings.safetensors"),
    model: Model = DEFAULT_MODEL,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 64,
    on_error: OnError = None,
    normalize: Annotated[bool, typer.Option(help="Vectors of length 1.")] = True,
    engine: Annotated[str, typer.Option(help="For parts: process, or ray.")] = "process",
    processes: Annotated[
        int, typer.Option(min=1, help="For parts: processes, or Ray's actors, each with a model.")
    ] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With --engine ray: GPUs of each actor.")] = 0,
    part_rows: PartRows = 8192,
    vectors: Vectors = "float32",
    file_format: Annotated[str, typer.Option("--format", help="Of parts: safetensors, parquet.")] = "safetensors",
    workers: Workers = None,
    files: FileList = None,
    video: Video = None,
    fps: Fps = None,
    seconds: Seconds = None,
    frames: Frames = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    keep: Keep = None,
    texts: Texts = False,
    fast: Fast = False,
    as_json: Json = False,
) -> None:
    """One vector an input: a safetensors file, or parts that can be killed, resumed and shared between processes."""
    from perception_encoder.retrieval.parts import DTYPES, SUFFIXES

    _choose("--vectors", vectors, DTYPES)
    _choose("--format", file_format, SUFFIXES)
    if out.suffix != ".safetensors" and _names_file(out):
        raise ConfigError(
            f"--out {out}: vectors go into one .safetensors file, or into a folder of parts, such as -o embeddings/"
        )
    given, typed = _given(sources, files), _typed(context)
    load = _loader(model, config, device, dtype, fast)
    if out.suffix == ".safetensors":
        _refuse(typed & OF_PARTS, "for parts; give a folder, such as -o embeddings/")
        _embed_file(load, given, out, batch_size, on_error or "raise", normalize, workers, as_json)
        return
    if engine != "ray":
        _refuse(typed & {"gpus"}, "for --engine ray")
    found = _source(given, video, fps, seconds, frames, image_column, text_column, id_column, keep, texts)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "part_rows": part_rows,
        "normalize": normalize,
        "dtype": vectors,
        "file_format": file_format,
        "on_error": on_error or "log",
        "workers": workers,
        "progress": True,
    }
    before = _whole(out)
    parts = _embed_parts(load, found, out, engine, processes, gpus, settings)
    if os.environ.get("RANK", "0") != "0":
        return
    failed = parts.failures()
    result = {
        "out": str(out),
        "parts": parts.plan.parts,
        "finished": len(parts.finished()),
        "rows": len(parts),
        "failed": [{"source": f.source, "reason": f.reason} for f in failed],
    }
    there = f" ({before} were there already)" if before else ""
    made = f"{result['rows']} vectors in {result['finished']} of {result['parts']} parts{there}"
    text = f"{out}: {made}, {len(failed)} failed"
    show(result, as_json, lambda: text)


def _embed_parts(
    load: Any, found: Any, out: Path, engine: str, processes: int, gpus: float, settings: dict[str, Any]
) -> Any:
    if engine == "ray":
        from perception_encoder.retrieval.engines import embed_with_ray

        return embed_with_ray(load, found, out, actors=processes, gpus=gpus, **settings)
    if engine != "process":
        raise ConfigError(f"--engine {engine!r}; choose process or ray")
    if processes > 1:
        from perception_encoder.retrieval.engines import embed_with_processes

        return embed_with_processes(load, found, out, processes=processes, **settings)
    from perception_encoder.retrieval.pipeline import embed_parts

    return embed_parts(load(), found, out, **settings)


def _embed_file(
    load: Any,
    sources: list[str],
    out: Path,
    batch_size: int,
    on_error: str,
    normalize: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    from perception_encoder.retrieval.embed import Embeddings, embed_images, fingerprint, save_embeddings
    from perception_encoder.retrieval.sources import kind_of_all

    if (kind := kind_of_all(sources)) != "image":
        raise ConfigError(f"a .safetensors file takes pictures alone; for {KINDS[kind]} give a folder: -o embeddings/")
    encoder, files = load(), cli._files(sources)
    failures: list[Any] = []
    vectors = embed_images(
        encoder,
        files,
        batch_size=batch_size,
        normalize=normalize,
        progress=True,
        on_error=on_error,
        failures=failures,
        workers=workers,
    )
    lost = {failure.row for failure in failures}
    names = [cli._text(file) for index, file in enumerate(files) if index not in lost]
    save_embeddings(out, Embeddings(vectors, names, fingerprint(encoder)))
    found = {
        "out": str(out),
        "rows": len(vectors),
        "width": vectors.shape[1],
        "failed": [{"image": f.source, "reason": f.reason} for f in failures],
    }
    show(found, as_json, lambda: f"{out}: {len(vectors)} vectors of {vectors.shape[1]}, {len(failures)} failed")


def build(
    context: typer.Context,
    sources: Sources = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the index.")] = Path("index"),
    model: Annotated[
        str | None, typer.Option(help="A model name, hub id, folder or file. `perception models` lists names.")
    ] = None,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    store: Annotated[str, typer.Option(help="faiss, or lance.")] = "faiss",
    kind: Kind = "auto",
    max_memory: Memory = None,
    max_latency: Latency = None,
    target_recall: Recall = 0.95,
    query: Annotated[
        list[str] | None, typer.Option("--query", help="A sentence to measure recall with; may repeat.")
    ] = None,
    batch_size: BatchSize = 64,
    on_error: OnError = "log",
    part_rows: PartRows = 8192,
    vectors: Vectors = "float32",
    workers: Workers = None,
    files: FileList = None,
    video: Video = None,
    fps: Fps = None,
    seconds: Seconds = None,
    frames: Frames = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    keep: Keep = None,
    texts: Texts = False,
    fast: Fast = False,
    as_json: Json = False,
) -> None:
    """A searchable index of pictures (or texts, or videos), chosen and tuned for memory, time and recall."""
    from perception_encoder.retrieval.index import Index
    from perception_encoder.retrieval.making import is_parts
    from perception_encoder.retrieval.parts import DTYPES, read_plan

    _choose("--vectors", vectors, DTYPES)
    _need_folder(f"--out {out}: an index is", out)
    given = _given(sources, files)
    if len(given) == 1 and is_parts(given[0]):
        _refuse(_typed(context) & OF_EMBEDDING, f"for embedding; {given[0]} holds vectors already")
        found: Any = given[0]
        named = model or (read_plan(given[0]).model if query else None)
        encoder = _loader(named, config, device, dtype, fast)() if named else None
        settings: dict[str, Any] = {}
    else:
        found = _source(
            given,
            video,
            fps,
            seconds,
            frames,
            image=image_column,
            text=text_column,
            id=id_column,
            keep=keep,
            texts=texts,
        )
        encoder = _loader(model or DEFAULT_MODEL, config, device, dtype, fast)()
        settings = {
            "batch_size": batch_size,
            "part_rows": part_rows,
            "dtype": vectors,
            "on_error": on_error or "log",
            "workers": workers,
            "progress": True,
        }
    index = Index.build(
        found,
        encoder,
        out,
        store=store,  # type: ignore[arg-type]
        kind=kind,
        max_memory=max_memory,
        max_latency=None if max_latency is None else max_latency / 1000,
        target_recall=target_recall,
        queries=query or None,
        **settings,
    )
    result = {"out": str(out), "rows": len(index), **index.report()}
    show(result, as_json, lambda: f"{out}: {len(index)} rows\n{_report_text(index.report())}")


def add(
    index: IndexFolder,
    sources: Sources = [],  # noqa: B006
    on_duplicate: Annotated[str, typer.Option(help="What is there already: skip, replace, or error.")] = "skip",
    model: IndexModel = None,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 64,
    on_error: OnError = "log",
    workers: Workers = None,
    files: FileList = None,
    video: Video = None,
    fps: Fps = None,
    seconds: Seconds = None,
    frames: Frames = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    keep: Keep = None,
    texts: Texts = False,
    merged: Annotated[bool, typer.Option("--merge", help="Fold the new pictures into the index.")] = False,
    as_json: Json = False,
) -> None:
    """Embed more inputs and add them; searches find them at once."""
    given = _given(sources, files)
    found = _source(given, video, fps, seconds, frames, image_column, text_column, id_column, keep, texts)
    opened = _open(index, model, config, device, dtype)
    options = {"batch_size": batch_size, "on_error": on_error or "log", "workers": workers, "progress": True}
    added = opened.add(found, on_duplicate=on_duplicate, **options)
    if merged:
        opened.merge()
    show(
        {"index": str(index), "added": added, "rows": len(opened)},
        as_json,
        lambda: f"{index}: {added} added, {len(opened)} rows",
    )


def delete(
    index: IndexFolder,
    ids: Annotated[list[str], typer.Argument(help="Ids, as search shows them.")],
    as_json: Json = False,
) -> None:
    """Forget rows by id."""
    opened = _open(index)
    if not (gone := opened.delete(ids)):
        named = ", ".join(repr(cli._text(one)) for one in ids)
        raise ConfigError(f"none of these is in {index}: {named}; ids are as `perception search` shows them")
    show(
        {"index": str(index), "deleted": gone, "rows": len(opened)},
        as_json,
        lambda: f"{index}: {gone} deleted, {len(opened)} rows",
    )


def merge(index: IndexFolder, as_json: Json = False) -> None:
    """Fold what was added and deleted since the build into the index."""
    opened = _open(index)
    opened.merge()
    show(opened.report()["now"], as_json, lambda: f"{index}: {len(opened)} rows in one index")


def report(index: IndexFolder, as_json: Json = False) -> None:
    """What the index is, and the recall and speed that were measured when it was built."""
    found = _open(index).report()
    show(found, as_json, lambda: _report_text(found))


def duplicates(
    index: IndexFolder,
    threshold: Annotated[float, typer.Option(help="The least cosine of two that count as the same.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Groups of pictures that are nearly the same."""
    groups = _open(index).duplicates(threshold)
    text = "\n\n".join("\n".join(cli._text(one) for one in group) for group in groups)
    show(groups, as_json, lambda: text or f"no two with a cosine of {threshold} or more")


def clusters(
    index: IndexFolder,
    k: Annotated[int, typer.Option("-k", min=1, help="How many groups.")] = 10,
    as_json: Json = False,
) -> None:
    """The pictures in groups of a kind, each with those nearest its middle."""
    found = _open(index).clusters(k)
    rows = [[str(len(c.ids)), f"{c.cosine:.3f}", "  ".join(cli._text(one) for one in c.ids[:3])] for c in found]
    show(
        [cluster._asdict() for cluster in found], as_json, lambda: table(rows, ["rows", "cosine", "nearest the middle"])
    )


def export(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(help="A folder.")],
    layout: Annotated[str, typer.Option(help="clip-retrieval, or npy.")] = "clip-retrieval",
    as_json: Json = False,
) -> None:
    """Write the vectors for other tools: .npy beside Parquet."""
    from perception_encoder.retrieval.exchange import export_vectors

    _need_folder(f"{out}: an export is", out)
    opened = _open(index)
    which = "text" if opened.facts.kind == "text" else "image"
    found = export_vectors(opened.store, out, layout=layout, which=which)  # type: ignore[arg-type]
    show({"out": str(out), **found}, as_json, lambda: f"{out}: {found['rows']} rows in {found['files']} files")


def import_(
    source: Annotated[
        Path, typer.Argument(help="A folder of clip-retrieval's, or .npy files with .parquet beside them.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the parts; `perception index` takes it.")],
    model: Annotated[str | None, typer.Option(help="The model that made the vectors; you vouch for it.")] = None,
    config: ConfigFile = None,
    which: Annotated[str, typer.Option(help="image, or text.")] = "image",
    root: Annotated[
        list[str] | None, typer.Option("--root", help="A folder whose pictures may be shown; may repeat.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take over vectors that another tool made, as parts."""
    from perception_encoder.retrieval.exchange import EMBEDDINGS, import_vectors

    _choose("--which", which, EMBEDDINGS)
    _need_folder(f"--out {out}: parts are", out)
    encoder = _loader(model, config, "cpu", "auto", False)() if model else None
    parts = import_vectors(source, out, model=encoder, which=which, roots=tuple(root or ()))  # type: ignore[arg-type]
    show(
        {"out": str(out), "rows": len(parts), "failed": len(parts.failures())},
        as_json,
        lambda: f"{out}: {len(parts)} vectors, {len(parts.failures())} failed",
    )


def search(
    index: IndexFolder,
    query: Annotated[
        list[str] | None, typer.Argument(help="A sentence or a picture; several are examples of one thing.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many to show.")] = 10,
    minus: Annotated[
        list[str] | None, typer.Option("--minus", help="A sentence or a picture it should not be like; may repeat.")
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option("--like", help="The id of a picture in the index; may repeat.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--filter", help="NAME=VALUE, also != < <= > >= and ~ for part of a text; may repeat."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures in it.")] = None,
    model: IndexModel = None,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """The pictures nearest to a sentence, a picture, or several of them."""
    if html is not None and html.is_dir():
        raise ConfigError(f"--html {html} is a folder; give a file, such as {html / 'page.html'}")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {html}: a page is written; give a name that ends in .html")
    opened = _open(index, model, config, device, dtype)
    examples = [*(query or []), *(opened.vector(one) for one in like or [])]
    if not examples:
        raise ConfigError(
            'nothing to look for; give a sentence, a picture or --like ID: perception search idx "a red car"'
        )
    hits = opened.search(examples, k, minus=minus or None, filter=_filter(where or []))
    if html is not None:
        from perception.files import atomic_write
        from perception_encoder.retrieval.sheet import contact_sheet

        with atomic_write(html) as temporary:
            title = ", ".join([*(query or []), *(like or [])]) + (f", not {', '.join(minus)}" if minus else "")
            temporary.write_text(contact_sheet(opened, hits, title), "utf-8")
        note(f"wrote {html}")
    found = [{**hit._asdict(), "path": cli._text(hit.path), "id": cli._text(hit.id)} for hit in hits]
    rows = [[f"{hit.score:.4f}", cli._text(hit.id), _about(hit)] for hit in hits]
    show(found, as_json, lambda: table(rows, ["cosine", "picture", "known of it"]) if rows else "nothing found")


def _about(hit: Any) -> str:
    known = [f"{hit.size[0]}x{hit.size[1]}"] if hit.size[0] else []
    known += [f"{hit.span[0]:.2f}-{hit.span[1]:.2f} s"] if hit.span else []
    known += [" ".join(hit.text.split())[:60]] if hit.text else []
    return "  ".join([*known, *(f"{name}={str(v)[:30]}" for name, v in hit.metadata.items() if v is not None)])


def _filter(conditions: list[str]) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for one in conditions:
        parsed = re.fullmatch(r"([^=!<>~]+)(==|!=|<=|>=|=|<|>|~)(.*)", one, re.DOTALL)
        if parsed is None:
            raise ConfigError(f"--filter {one!r}; write NAME=VALUE, NAME>=VALUE or NAME~TEXT")
        name, operator, value = (
            parsed[1].strip(),
            {"=": "==", "~": "contains"}.get(parsed[2], parsed[2]),
            parsed[3].strip(),
        )
        found.setdefault(name, {})[operator] = value if operator == "contains" else _value(value)
    return found or None


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _report_text(found: dict[str, Any]) -> str:
    from perception_encoder.retrieval.choice import show_bytes

    facts, now, built = found["facts"], found["now"], found["built"]
    named = facts["model"] or ("nobody said which" if facts["fingerprint"] == "unknown" else "built by hand")
    lines = [f"{'model':<16}{named}  ({facts['fingerprint']})", f"{'store':<16}{facts['store']}, of {facts['kind']}s"]
    lines += [f"{name:<16}{now[name]}" for name in ("rows", "width", "version", "deleted") if name in now]
    if not built:
        return "\n".join(lines)
    index, measured = built["index"], built["measured"]
    lines.append(f"{'index':<16}{index['kind']}, {show_bytes(now['memory'])} in memory; {index['why']}")
    since = "" if built["rows"] == now["rows"] else f" (when there were {built['rows']} rows)"
    if measured["recall"] is not None:
        queries = ", ".join(f"{count} {name}" for name, count in measured["queries"].items())
        against = f"against exact search; queries: {queries}{since}"
        lines.append(f"{'recall@' + str(measured['k']):<16}{measured['recall']:.4f}  {against}")
        lines.append(f"{'a query':<16}{1000 * measured['seconds a query']:.2f} ms{since}")
    missed = [name for name, met in built["met"].items() if not met]
    if any(built["asked"][name] is not None for name in ("max_memory", "max_latency")) or missed:
        lines.append(f"{'budgets':<16}{'not met: ' + ', '.join(missed) if missed else 'met'}")
    if now.get("searched one by one") and now.get("indexed"):
        lines.append(
            f"{'added since':<16}{now['searched one by one']} (looked at one by one; `perception index merge`)"
        )
    return "\n".join(lines)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _given(sources: list[str], files: Path | None) -> list[str]:
    from perception_encoder.retrieval.sources import read_list

    if files is not None and sources:
        raise ConfigError("give inputs or --files, not both")
    found = read_list(files) if files is not None else sources
    if not found:
        raise ConfigError("nothing to embed; give pictures, folders, tars, Parquet, videos, texts, or --files LIST")
    return found


def _source(
    given: list[str],
    video: str | None,
    fps: float | None,
    seconds: float | None,
    frames: int | None,
    image: str | None,
    text: str | None,
    id: str | None,
    keep: list[str] | None,
    texts: bool,
) -> Any:
    """The source, with the options its kind knows. Raises ConfigError for those of another kind."""
    from perception_encoder.retrieval.sources import as_source, kind_of_all

    kind = kind_of_all(given)
    columns = {"image": image, "text": text, "id": id, "keep": tuple(keep) if keep else None, "shown": texts or None}
    options: dict[str, Any] = {name: value for name, value in columns.items() if value is not None}
    if kind == "parquet":
        return as_source(given, **{**options, "shown": "text" if texts else "image"})
    if options:
        raise ConfigError(f"--image-column, --text-column, --id-column, --keep and --texts are for Parquet, not {kind}")
    sizes: dict[str, Any] = {"fps": fps} if (video or "frames") == "frames" else {"seconds": seconds, "frames": frames}
    unused = {"fps": fps, "seconds": seconds, "frames": frames, "video": video}
    if kind == "video":
        unused = {name: value for name, value in unused.items() if name not in ("video", *sizes)}
    if wrong := [f"--{name}" for name, value in unused.items() if value is not None]:
        where = f"--video {video or 'frames'}" if kind == "video" else f"{kind}s"
        raise ConfigError(f"{', '.join(wrong)}: not for {where}")
    if kind != "video":
        return as_source(given)
    sizes = {name: value for name, value in sizes.items() if value is not None}
    return as_source(given, video=video or "frames", **sizes)  # type: ignore[arg-type]


def _loader(model: str, config: Path | None, device: str, dtype: str, fast: bool) -> Any:
    """A function that loads the model, in this process or another."""
    if model == DEFAULT_MODEL:
        note(NANO_NOTE)
    return functools.partial(load_model, model, config, device, dtype, fast)


def load_model(model: str, config: Path | None, device: str, dtype: str, fast: bool) -> Any:
    import torch

    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    loaded = cli._load(model, config, device, dtype)
    if fast:
        from perception.optimize import optimize

        return optimize(loaded)
    return loaded


def _open(
    folder: Path, model: str | None = None, config: Path | None = None, device: str = "auto", dtype: str = "auto"
) -> Any:
    """The index, with a model where one is given or the index's own is wanted in another place or precision."""
    from perception_encoder.retrieval.index import Index, read_facts

    if model is None and (device, dtype, config) == ("auto", "auto", None):
        return Index.open(folder)
    named = model or read_facts(folder).model
    return Index.open(folder, model=None if named is None else load_model(named, config, device, dtype, False))


def _typed(context: typer.Context) -> set[str]:
    """The options that were given, rather than left as they are."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _refuse(options: set[str], why: str) -> None:
    """Nothing that was asked for is left out in silence."""
    if options:
        names = sorted("--" + FLAGS.get(name, name.replace("_", "-")) for name in options)
        raise ConfigError(f"{', '.join(names)}: {why}")


def _choose(option: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        raise ConfigError(f"{option} {given}; choose from {', '.join(known)}")


def _names_file(out: Path) -> bool:
    """Whether a name is that of a file, by its ending; a folder that is there is one whatever it is called."""
    return out.suffix.lower() in FILES and not out.is_dir()


def _need_folder(what: str, out: Path) -> None:
    if _names_file(out):
        raise ConfigError(f"{what} a folder; give a name without {out.suffix}")


def _whole(folder: Path) -> int:
    """Parts that need not be made."""
    from perception_encoder.retrieval.making import is_parts
    from perception_encoder.retrieval.parts import Parts

    if not is_parts(folder):
        return 0
    parts = Parts(folder)
    return parts.plan.parts - len(parts.missing())
