"""The verbs of the encoder: models, download, convert, inspect, classify, features, pca, demo, train-encoder.

Those of retrieval (embed, index, search) are in `retrieval_cli`.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from perception.cli import Device, Dtype, Json, check_picture, note, show, table
from perception.errors import ConfigError

DEFAULT_MODEL = "PE-Core-nano"
NANO_NOTE = (
    f"{DEFAULT_MODEL} is a small model for drawings that needs no download; for photographs use "
    "--model PE-Core-B16-224 or larger"
)

Model = Annotated[str, typer.Option(help="A model name, hub id, folder or file. `perception models` lists names.")]
Images = Annotated[list[str], typer.Argument(help="Picture files, or folders of them.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures a batch.")]
OnError = Annotated[str, typer.Option(help="A picture that cannot be read: raise (stop), skip, or log.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side in pixels, a multiple of the patch; more is finer.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that holds another model, too.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A config.json, for a bare file of weights.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command; called through the entry-point group `perception.commands`."""
    from perception_encoder import retrieval_cli

    for verb in (models, download, convert, inspect, classify, features, pca, demo):
        app.command(verb.__name__)(verb)
    app.command("train-encoder")(train_encoder)
    retrieval_cli.register(app)


def models(
    pattern: Annotated[str, typer.Argument(help="A wildcard, such as '*core*'.")] = "*", as_json: Json = False
) -> None:
    """Every model known by name, encoders and language models, with its size, licence and where it comes from."""
    from perception_encoder import zoo

    found = zoo.everything(pattern)
    if not found:
        raise ConfigError(f"no model matches {pattern!r}; `perception models` lists all of them")
    header = ["name", "kind", "parameters", "pixels", "patch", "licence", "from"]
    show(found, as_json, lambda: table([_model_row(model) for model in found], header))


def _model_row(model: dict[str, Any]) -> list[str]:
    """Of one entry of a catalogue; an encoder that another distribution registered has a name and a provider only."""
    vision = model.get("vision", {})
    millions = f"{model['parameters'] / 1e6:.1f} M" if "parameters" in model else "-"
    source = next(iter(model.get("weights", {}).values()), model.get("provider", "-"))
    sizes = [str(vision.get(size, "-")) for size in ("image_size", "patch_size")]
    return [model["name"], model["kind"], millions, *sizes, model.get("licence", "-"), source]


def download(
    name: Annotated[str, typer.Argument(help="A model name or hub id.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also store it as a folder of our format here.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the hub repository.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fetch a model's weights into the cache, so that it loads without a network."""
    from perception_encoder import checkpoints, zoo

    if out is not None:
        checkpoints.check_path(out, "native")
    if not zoo.is_known(name) and os.path.exists(os.path.expanduser(name)):  # noqa: PTH110, PTH111  a name may be too long for a Path
        raise ConfigError(
            f"{name} is on this machine already; a model is fetched by its name or hub id, hf://owner/name"
        )
    if out is not None and not zoo.is_known(name) and (error := zoo.other_kind(name)):
        raise error  # before gigabytes are fetched for nothing
    path = zoo.download(name, revision=revision)
    if out is not None:
        checkpoints.export(_load(name, None, "cpu", "auto", revision=revision), out, "native", replace=force)
    found = {"name": name, "file": str(path), "bytes": path.stat().st_size if path.is_file() else None}
    show({**found, "folder": str(out) if out else None}, as_json, lambda: str(out or path))


def convert(
    source: Annotated[str, typer.Argument(help="A model name, hub id, folder or file.")],
    out: Annotated[Path, typer.Argument(help="A folder (native) or a file (the other layouts).")],
    layout: Annotated[str, typer.Option(help="native, reference, timm or open_clip.")] = "native",
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model in another layout, bit for bit the same weights."""
    from perception_encoder import checkpoints

    checkpoints.check_path(out, layout)  # before the model is loaded
    checkpoints.export(_load(source, config, "cpu", "stored"), out, layout=layout, replace=force)
    show({"layout": layout, "out": str(out)}, as_json, lambda: str(out))


def inspect(
    source: Annotated[str, typer.Argument(help="A file or folder of weights, or a model name.")], as_json: Json = False
) -> None:
    """What a file of weights holds, without running anything in it."""
    from perception_encoder.inspection import inspect as look

    found = look(source)
    tensors = found.pop("tensors")
    rows = [[t["name"], "x".join(map(str, t["shape"])) or "-", t["dtype"]] for t in tensors]
    text = "\n".join(f"{key:<12}{value}" for key, value in found.items() if value is not None)
    show({**found, "tensors": tensors}, as_json, lambda: f"{text}\n\n{table(rows, ['tensor', 'shape', 'dtype'])}")


def classify(
    images: Images,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="A label; give it again for more.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with one label a line.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="A sentence with {} for the label; may repeat.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to show a picture.")] = 3,
    model: Model = DEFAULT_MODEL,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    on_error: OnError = "raise",
    as_json: Json = False,
) -> None:
    """Which of the labels fit each picture best, without training."""
    from perception_encoder.zero_shot import DRAWING_TEMPLATES, ZeroShotClassifier, read_labels

    names = [*(label or []), *(read_labels(labels) if labels else [])]
    if not names:
        raise ConfigError("no labels given; use --label cat --label dog, or --labels FILE with one a line")
    clip = _load_clip(model, config, device, dtype)
    templates = template or (DRAWING_TEMPLATES if model == DEFAULT_MODEL else None)
    files = _files(images)
    rows = ZeroShotClassifier(clip, names, templates).predict(
        files, top=top, batch_size=batch_size, on_error=on_error, progress=not as_json
    )
    found = [
        {"image": _text(file), "labels": [prediction._asdict() for prediction in row]}
        for file, row in zip(files, rows, strict=True)
    ]

    def text() -> str:
        cells = [
            [_text(file), "   ".join(f"{p.label} {p.score:.1%}" for p in row) or "could not be read"]
            for file, row in zip(files, rows, strict=True)
        ]
        return table(cells, ["image", "labels"])

    show(found, as_json, text)


def features(
    images: Images,
    out: Out = Path("features.safetensors"),
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="A block, 0 the first, -1 the last; may repeat.")
    ] = None,
    norm: Annotated[bool, typer.Option(help="After the final norm.")] = False,
    size: Size = None,
    model: Model = DEFAULT_MODEL,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Patch features on their grid at chosen layers, into a safetensors file: layer.N.patches, layer.N.prefix."""
    import torch
    from safetensors.torch import save_file

    from perception.files import atomic_write
    from perception_encoder.features import features as dense

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} is no .safetensors file; features are written as one")
    tower, files = _load_tower(model, config, device, dtype), _files(images)
    layers = layer or [-1]
    per_image = []
    for file in _bar(files):  # to the CPU one by one: the device's memory need not hold those of all pictures
        found = dense(tower, file, layers, norm=norm, size=size)
        per_image.append([type(f)(f.patches.cpu(), f.prefix.cpu()) for f in found])
    tensors = {}
    for i, index in enumerate(layers):
        tensors[f"layer.{index}.patches"] = torch.cat([f[i].patches for f in per_image]).contiguous()
        tensors[f"layer.{index}.prefix"] = torch.cat([f[i].prefix for f in per_image]).contiguous()
    with atomic_write(out) as temporary:
        save_file(tensors, temporary, metadata={"images": json.dumps([_text(file) for file in files])})
    report = {"out": str(out), "images": len(files), "tensors": {k: list(v.shape) for k, v in tensors.items()}}
    lines = [f"{name:<24}{tuple(tensor.shape)}" for name, tensor in tensors.items()]
    show(report, as_json, lambda: "\n".join([str(out), *lines]))


def pca(
    images: Images,
    out: Out = Path("pca.png"),
    layer: Annotated[int, typer.Option(help="A block, 0 the first, -1 the last.")] = -1,
    size: Size = None,
    model: Model = DEFAULT_MODEL,
    config: ConfigFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Patch features as colours; several pictures share their axes and stand side by side."""
    from PIL import Image

    from perception.files import atomic_write
    from perception_encoder.visualize import pca_image

    check_picture(out)
    pictures = pca_image(_load_tower(model, config, device, dtype), _files(images), layer=layer, size=size)
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width
    with atomic_write(out) as temporary:
        sheet.save(temporary)
    show({"out": str(out), "images": len(pictures), "size": list(sheet.size)}, as_json, lambda: str(out))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the page.")] = Path("demo"),
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """See the encoder work on bundled pictures and a clip, offline, and write one HTML page about it."""
    from perception_encoder.demo import run

    if (out.exists() and not out.is_dir()) or out.suffix.lower() in (".html", ".htm", ".png", ".jpg"):
        raise ConfigError(f"--out {out} is no folder; the page and its files are written into one")
    page, summary = run(_load_clip(model, None, device, "auto", quiet=True), out, echo=note)
    show({"page": str(page.resolve()), **summary}, as_json, lambda: f"\nOpen {page.resolve()}")


def train_encoder(
    run: Annotated[str, typer.Argument(help="A run file (TOML), or the name of one that comes with the package.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="In place of the file's, as optimizer.lr=1e-4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and take one step that is thrown away.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, finetune or probe an encoder as a run file says; run again, it continues. Under torchrun, on many."""
    import logging

    from perception_encoder.training import launch, probing
    from perception_encoder.training.config import ProbeRun, load_run, run_names

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not Path(run).exists() and Path(run).name.removesuffix(".toml") not in run_names():
        raise ConfigError(f"no run file at {run}; those of the package are {', '.join(run_names())}")
    settings = load_run(run, override or ())
    if dry_run:
        found = probing.rehearse(settings) if isinstance(settings, ProbeRun) else launch.rehearse(settings)
        show(found, as_json, lambda: "\n".join(f"{key:<12}{value}" for key, value in found.items()))
        return
    if isinstance(settings, ProbeRun):
        found = probing.probe(settings)
        show({"out": settings.out, **found}, as_json, lambda: probing.summary(found))
        return
    done = launch.train(settings)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one says it
        return
    folder = str(Path(settings.out) / "model") if done else None
    said = folder or f"stopped; the same command continues it from {settings.out}"
    show({"out": settings.out, "finished": done, "model": folder}, as_json, lambda: said)


def _load_clip(model: str, config: Path | None, device: str, dtype: str, *, quiet: bool = False) -> Any:
    from perception_encoder.config import ClipConfig
    from perception_encoder.zoo import load_clip

    if model == DEFAULT_MODEL and not quiet:
        note(NANO_NOTE)
    if not _holds_both(model, config):
        raise ConfigError(
            f"{model} holds a vision tower and no text tower, so it cannot compare pictures with words; use a PE-Core "
            "model (`perception models '*core*'`). `perception features` and `perception pca` take a tower"
        )
    return load_clip(model, config=_config(ClipConfig, config), device=device, dtype=dtype)


def _load_tower(model: str, config: Path | None, device: str, dtype: str) -> Any:
    from perception_encoder.config import VisionConfig
    from perception_encoder.zoo import load_encoder

    if model == DEFAULT_MODEL:
        note(NANO_NOTE)
    return load_encoder(model, config=_config(VisionConfig, config), device=device, dtype=dtype)


def _load(source: str, config: Path | None, device: str, dtype: str, *, revision: str | None = None) -> Any:
    from perception_encoder import zoo
    from perception_encoder.config import ClipConfig, VisionConfig

    both = _holds_both(source, config, revision)
    load, kind = (zoo.load_clip, ClipConfig) if both else (zoo.load_encoder, VisionConfig)
    return load(source, config=_config(kind, config), device=device, dtype=dtype, revision=revision)


def _holds_both(source: str, config: Path | None, revision: str | None = None) -> bool:
    """Whether this is a CLIP model: its config file says so where there is one, the weights themselves elsewhere."""
    from perception_encoder.inspection import kind_of

    return kind_of(source, revision) == "clip" if config is None else "text" in _json(config)


def _config(kind: Any, path: Path | None) -> Any:
    return None if path is None else kind.from_dict(_json(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected a table, as in a model's config.json")
    return found


def _files(images: list[str]) -> list[Any]:
    from perception.media import iter_images

    files: list[Any] = []
    for given in images:
        files += list(iter_images(given)) if Path(given).is_dir() else [given]
    if not files:
        raise ConfigError(f"no pictures in {', '.join(images)}")
    return files


def _bar(items: list[Any]) -> Any:
    from tqdm import tqdm

    return tqdm(items, unit="image", disable=None if len(items) > 1 else True)


def _text(path: Any) -> str:
    """A path as text that any terminal and JSON can hold: bytes that are not UTF-8 come out as escapes."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
