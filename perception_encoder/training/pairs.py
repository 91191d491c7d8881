"""Pictures with captions or labels, by number: folders, tables, tar archives; and the batches of a run.

B batch  S side
"""

import csv
import hashlib
import io
import json
import random
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from perception.errors import ConfigError, LimitError, MediaError
from perception.media import iter_images, read_image
from perception.training.order import Order, mix
from perception_encoder.training.config import PairsConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_ROWS_FILE = 8 * 2**30  # bytes
TRIES = 16  # rows looked at for one sample, when some cannot be read


class Pair(NamedTuple):
    """One sample: what `read_image` takes, and its captions (or the one label)."""

    image: Any
    texts: tuple[str, ...]


class Pairs(Protocol):
    """Samples by number; the same number gives the same sample. `where` names one in messages."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...
    def where(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...


def open_pairs(config: PairsConfig) -> Pairs:
    """The samples that a run file names. Raises ConfigError for what is not there or holds none."""
    path = Path(config.source)
    pairs: Pairs
    if path.is_dir():
        pairs = FolderPairs(path)
    elif not path.is_file():
        raise ConfigError(f"no data at {path}; expected a folder, or a .csv, .tsv, .jsonl or .tar file")
    elif path.suffix == ".tar":
        pairs = TarPairs(path)
    elif path.suffix in (".csv", ".tsv", ".jsonl"):
        pairs = RowPairs(path, config)
    else:
        raise ConfigError(f"{path} is of no kind known here; expected a folder, or a .csv, .tsv, .jsonl or .tar file")
    if not len(pairs):
        raise ConfigError(f"{path} holds no picture with a text")
    return pairs


class FolderPairs:
    """A folder of pictures: the text is the .txt beside each, one caption a line, or else the name of its folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = sorted(iter_images(self.folder))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        file = self.files[index]
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            return Pair(file, (file.parent.name.replace("_", " "),))
        try:
            lines = beside.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise MediaError(f"{beside} is no UTF-8 text ({error}); write it again in UTF-8") from error
        return Pair(file, _texts(lines, str(beside)))

    def where(self, index: int) -> str:
        return str(self.files[index])

    def fingerprint(self) -> str:
        return _digest(str(file.relative_to(self.folder)) for file in self.files)


class RowPairs:
    """The rows of a .csv or .tsv file with a header, or of a .jsonl file; pictures are paths inside `root`."""

    def __init__(self, path: Path, config: PairsConfig):
        self.path, self.config = path, config
        self.root = Path(config.root or path.parent).resolve()
        if path.stat().st_size > MAX_ROWS_FILE:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, too many for a file of rows")
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        self.rows: list[Any] = []
        self.lines = array("Q")  # where each row begins, from 1
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.split("\n"), 1):  # JSON's texts may hold what `splitlines` cuts at
                if line.strip():
                    self.rows.append(line)
                    self.lines.append(number)
            return
        table = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
        names = list(table.fieldnames or ())
        if not {config.image, config.text} <= set(names):
            raise ConfigError(f"{path} has the columns {names}; the run asks for {config.image!r} and {config.text!r}")
        for row in table:  # which ends in line `line_num`; a text in quotes may have several
            self.rows.append(row)
            self.lines.append(table.line_num - _breaks(row.values()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        try:
            row = json.loads(row) if isinstance(row, str) else row
            image, text = row[self.config.image], row[self.config.text]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MediaError(
                f"{self.where(index)}: no row with {self.config.image!r} and {self.config.text!r} ({error})"
            ) from error
        if not isinstance(image, str):
            raise MediaError(f"{self.where(index)}: the picture is {image!r:.60}; expected a path")
        try:
            file = (self.root / image).resolve()
        except (ValueError, RuntimeError) as error:  # a zero byte, a link to itself
            raise MediaError(f"{self.where(index)}: {image!r:.60} is no path ({error})") from error
        if not file.is_relative_to(self.root):
            raise MediaError(f"{self.where(index)}: {image!r} is outside of {self.root}")
        return Pair(file, _texts(text, self.where(index)))

    def where(self, index: int) -> str:
        return f"{self.path}:{self.lines[index]}"

    def fingerprint(self) -> str:
        return _digest(json.dumps(row) for row in self.rows)


def _breaks(values: Iterable[Any]) -> int:
    """Line breaks in the values of a row; what is too much in it comes as a list, what is missing as None."""
    return sum(_breaks(value) if isinstance(value, list) else (value or "").count("\n") for value in values)


class TarPairs:
    """A tar archive of files that share a stem: a picture, and a .txt or a .json with "caption" or "text".

    The layout of WebDataset (Aizman et al. 2019). Members are read where they lie; nothing is unpacked.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    if member.isreg():
                        stem, dot, suffix = member.name.partition(".")
                        groups.setdefault(stem, {})[(dot + suffix).lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(f"{self.path} is no tar archive that can be read: {error}") from error
        self.samples = []
        for stem, parts in groups.items():
            picture = next((at for suffix, at in parts.items() if suffix in PICTURES), None)
            text = next(((suffix, parts[suffix]) for suffix in (".txt", ".json") if suffix in parts), None)
            if picture and text:
                self.samples.append((stem, picture, text))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        _, picture, (suffix, text) = self.samples[index]
        try:
            found: Any = self._read(text).decode("utf-8")
            if suffix == ".json":
                row = json.loads(found)
                found = row["caption"] if "caption" in row else row["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MediaError(f"{self.where(index)}: no caption ({error})") from error
        return Pair(self._read(picture), _texts(found, self.where(index)))

    def _read(self, at: tuple[int, int]) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at[0])
            return file.read(at[1])

    def where(self, index: int) -> str:
        return f"{self.path}, {self.samples[index][0]}"

    def fingerprint(self) -> str:
        return _digest(map(str, self.samples))


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One process's share of a step.

    pixels   B 3 S S
    texts    B
    labels   B, each text's place among `classes`; None without classes
    teacher  B 3 T T, the same crops as a teacher takes them; None without one
    """

    pixels: Tensor
    texts: list[str]
    labels: Tensor | None = None
    teacher: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """What the record counts: pictures."""
        return torch.empty(len(self.pixels), dtype=torch.bool)


@dataclass(frozen=True)
class Lost:
    """A row that could not be used."""

    source: str
    index: int
    why: str
    too_long: bool = False


@dataclass
class Report:
    samples: int = 0
    lost: list[Lost] = field(default_factory=list)


@dataclass
class Step:
    packs: Iterator[Batch]
    report: Report


class PairStream:
    """The batches of one process of `size`, step after step.

    Sample k of the run is a function of k alone: which row, which of its captions, which crop. Process `rank` takes
    every `size`-th of a step's. In place of a row that cannot be read stands the next one that can.

    preprocess  crop -> 3 S S
    teacher     the same for a teacher, or None
    classes     label -> number, to learn labels
    """

    def __init__(
        self,
        pairs: Pairs,
        config: PairsConfig,
        preprocess: Callable[[Any], Tensor],
        batch: int,
        *,
        seed: int = 0,
        teacher: Callable[[Any], Tensor] | None = None,
        classes: dict[str, int] | None = None,
        rank: int = 0,
        size: int = 1,
    ):
        if batch % size:
            raise ConfigError(f"batch={batch} for {size} processes; each must hold as many samples as the others")
        self.pairs, self.config, self.preprocess, self.batch = pairs, config, preprocess, batch
        self.seed, self.teacher, self.classes, self.rank, self.size = seed, teacher, classes, rank, size
        self.order = Order([len(pairs)], seed=seed)

    def steps(self, position: int = 0) -> Iterator[Step]:
        """Endless; the first begins with sample `position`. The next step is read while this one is used."""
        with ThreadPoolExecutor(self.config.workers) as pool:

            def ask(at: int) -> list[Any]:
                return [pool.submit(self.sample, k) for k in range(at + self.rank, at + self.batch, self.size)]

            coming = ask(position)
            while True:
                position += self.batch
                ahead = ask(position)
                yield self._join([future.result() for future in coming])
                coming = ahead

    def sample(self, k: int) -> tuple[Tensor, str, Tensor | None, list[Lost]]:
        """The k-th sample of the run: pixels, text, the teacher's pixels, and the rows that were passed over."""
        lost: list[Lost] = []
        first = self.order[k].index
        for attempt in range(TRIES):
            index = (first + attempt) % len(self.pairs)
            try:
                pair = self.pairs[index]
                draw = random.Random(mix(self.seed, k, attempt))
                text = pair.texts[draw.randrange(len(pair.texts))]
                if self.classes is not None and text not in self.classes:
                    raise MediaError(f"{self.pairs.where(index)}: the label {text!r} is none of the classes")
                picture = self._look(read_image(pair.image), draw)
                return self.preprocess(picture), text, self.teacher and self.teacher(picture), lost
            except (MediaError, LimitError, OSError) as error:
                lost.append(Lost("data", index, f"{self.pairs.where(index)}: {error}"))
        raise MediaError(f"{TRIES} rows in a row cannot be used; the last: {lost[-1].why}")

    def empty(self) -> Batch:
        """Never needed: every process has as many passes as the others."""
        raise ConfigError("a step of this kind has one pass on every process")

    def _look(self, picture: Image.Image, draw: random.Random) -> Image.Image:
        """A random crop of like shape, and sometimes its mirror image."""
        if self.config.crop < 1:
            part = draw.uniform(self.config.crop, 1) ** 0.5
            stretch = draw.uniform(0.75, 4 / 3) ** 0.5
            width, height = (max(1, round(min(1.0, part * f) * side)) for f, side in _both(stretch, picture.size))
            left, top = draw.randint(0, picture.width - width), draw.randint(0, picture.height - height)
            picture = picture.crop((left, top, left + width, top + height))
        if draw.random() < self.config.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture

    def _join(self, samples: list[tuple[Tensor, str, Tensor | None, list[Lost]]]) -> Step:
        texts = [text for _, text, _, _ in samples]
        batch = Batch(
            torch.stack([pixels for pixels, _, _, _ in samples]),
            texts,
            None if self.classes is None else torch.tensor([self.classes[text] for text in texts]),
            None if self.teacher is None else torch.stack([seen for _, _, seen, _ in samples if seen is not None]),
        )
        return Step(iter([batch]), Report(len(samples), [bad for _, _, _, lost in samples for bad in lost]))


def class_names(pairs: Pairs) -> list[str]:
    """Every label once, in order, of the rows that can be read; the others are counted when it is their turn.

    Raises MediaError when no row has a label.
    """
    found: set[str] = set()
    why = ""
    for index in range(len(pairs)):
        try:
            found.update(pairs[index].texts)
        except (MediaError, LimitError, OSError) as error:
            why = why or f"; the first: {error}"
    if not found:
        raise MediaError(f"none of {len(pairs)} rows has a label{why}")
    return sorted(found)


def _both(stretch: float, size: tuple[int, int]) -> tuple[tuple[float, int], tuple[float, int]]:
    return (stretch, size[0]), (1 / stretch, size[1])


def _texts(value: object, where: str) -> tuple[str, ...]:
    given: Sequence[Any] = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = tuple(text.strip() for text in given if isinstance(text, str) and text.strip())
    if not texts:
        raise MediaError(f"{where}: the text is {value!r:.60}; expected a caption or a list of them")
    return texts


def _digest(parts: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
