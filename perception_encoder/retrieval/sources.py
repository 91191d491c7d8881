"""What there is to embed: folders, lists of files, Parquet, WebDataset tars, lines of text, videos.

A source says how its inputs divide into chunks, one a part, and reads one chunk at a time. A chunk is plain JSON and
says all there is to know to read it, so a plan can be carried out by any process that sees the same files.

Nothing here fetches and nothing is unpacked to disk: members of an archive are read as bytes, their names are names.
"""

import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from perception.errors import ConfigError, MediaError, missing_extra
from perception.media import PICTURE_SUFFIXES, describe, iter_images, open_regular, read_video

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ogv"),
    *(".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".asf"),
)
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_MEMBER = 200_000_000  # bytes of one picture in an archive
MAX_ROOTS = 16  # folders a plan names
FRAMES_AT_ONCE = 32  # of a video, in memory together

Chunk = dict[str, Any]


class Item(NamedTuple):
    """One input.

    id        its name; no other input of the job has it
    source    the file it is in
    inside    which of the things in that file: a tar member, a Parquet row, a line; "" for the whole of it
    data      what the model is shown: a path, bytes, frames N 3 H W or a text; an exception when it could not be read
    text      a caption that came with it
    start, end  seconds, for pieces of a video
    """

    id: str
    source: str
    data: Any
    inside: str = ""
    text: str | None = None
    start: float | None = None
    end: float | None = None
    metadata: Mapping[str, Any] = {}


class Source(Protocol):
    """Inputs that divide into chunks.

    kind  what the model is shown: "image", "text" or "clip" (several frames that make one vector)
    """

    kind: str

    def settings(self) -> dict[str, Any]:
        """What `open_source` needs to read a chunk again: {"type": ..., ...}."""
        ...

    def roots(self) -> list[str]:
        """The folders all inputs lie in."""
        ...

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Chunks of at most `rows` inputs, always the same for the same files; chunk["rows"] is None if unknown."""
        ...

    def items(self, chunk: Chunk) -> Iterator[Item]: ...


def as_source(given: Any, *, video: "VideoMode" = "frames", **options: Any) -> Source:
    """The source that a path or a list of paths stands for.

    given    a folder, a picture, `*.tar`, `*.parquet`, `*.txt` (a text a line), a video; several of one kind; a Source
    video    "frames" or "clips", for videos
    options  as the source's class takes them: Parquet's `image=`, `text=`, `id=`, `keep=`; video's `fps=`, `seconds=`,
             `frames=`

    A folder stands for the pictures in it; for its tars, Parquet files or videos when there are no pictures.
    Raises ConfigError when nothing is there, or several kinds are mixed; MediaError for a path that is not there.
    """
    if hasattr(given, "chunks") and hasattr(given, "items") and hasattr(given, "settings"):
        return given
    listed = [given] if isinstance(given, str | Path) else list(given)
    if bad := [one for one in listed if not isinstance(one, str | Path)]:
        raise ConfigError(f"parts are made of files, so that they can be made again; given {describe(bad[0])}")
    kind, files = _expand(listed)
    if kind == "text":
        return _make(TextLines, tuple(files), options)
    if kind == "tar":
        return _make(Tars, tuple(files), options)
    if kind == "parquet":
        return _make(ParquetRows, tuple(files), options)
    if kind == "video":
        return _make(Videos, tuple(files), {"mode": video, **options})
    given_folders = [str(one) for one in listed if Path(one).is_dir()]
    roots = given_folders if len(given_folders) == len(listed) <= MAX_ROOTS else folders(files)
    return _make(Pictures, tuple(files), {"folders": tuple(roots), **options})


def _make(kind: Any, files: tuple[str, ...], options: dict[str, Any]) -> Any:
    try:
        return kind(files, **options)
    except TypeError as error:
        known = [name for name in kind.__dataclass_fields__ if name not in ("files", "folders")]
        raise ConfigError(f"{kind.__name__} take the options {known}; given {sorted(options)}") from error


def _expand(listed: Sequence[str | Path]) -> tuple[str, list[str]]:
    """The kind of all of them together, and the files in order."""
    found: dict[str, list[str]] = {}
    for one in listed:
        if Path(one).is_dir():
            kind, files = _in_folder(one)
        else:
            kind, files = _kind(one), [str(one)]
            if len(listed) == 1 and not os.path.lexists(one):  # one of several is left out, as any that is unreadable
                raise MediaError(f"there is no file or folder {describe(one)}")
        found.setdefault(kind, []).extend(files)
    if len(found) != 1:
        kinds = {kind: files[0] for kind, files in found.items()}
        raise ConfigError(f"give inputs of one kind at a time; given {kinds or 'nothing'}")
    return next(iter(found.items()))


def kind_of_all(given: Sequence[str | Path]) -> str:
    """ "image", "text", "tar", "parquet" or "video". Raises ConfigError when they are not of one kind."""
    return _expand([given] if isinstance(given, str | Path) else given)[0]


def _kind(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in PARQUET_SUFFIXES:
        return "parquet"
    if str(path).lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise ConfigError(f"{path} is compressed, and pictures in it cannot be reached singly; decompress it to a .tar")
    return {".tar": "tar", ".txt": "text"}.get(suffix, "image")


def _in_folder(folder: str | Path) -> tuple[str, list[str]]:
    if pictures := [str(path) for path in iter_images(folder)]:
        return "image", pictures
    for kind, suffixes in (("tar", (".tar",)), ("parquet", PARQUET_SUFFIXES), ("video", VIDEO_SUFFIXES)):
        files = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)
        if files:
            return kind, files
    return "image", []


def open_source(settings: Mapping[str, Any]) -> Source:
    """The source that wrote these settings into a plan."""
    kinds: dict[str, Any] = {kind.type: kind for kind in (Pictures, TextLines, Tars, ParquetRows, Videos)}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key != "type"}
    if settings.get("type") not in kinds:
        raise ConfigError(f"no source of type {settings.get('type')!r}; there are: {', '.join(kinds)}")
    return _make(kinds[settings["type"]], (), options)


def folders(files: Iterable[str]) -> list[str]:
    """The folders of some files; of very many, the one they all lie in."""
    found = sorted({str(Path(file).parent) for file in files})
    return found if len(found) <= MAX_ROOTS else [os.path.commonpath([os.path.abspath(one) for one in found])]  # noqa: PTH100


# --- pictures in files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Picture files, in the order given. The id is the path as given."""

    files: tuple[str, ...]
    folders: tuple[str, ...] = ()
    type: ClassVar[str] = "pictures"
    kind: ClassVar[str] = "image"

    def settings(self) -> dict[str, Any]:
        return {"type": self.type, "folders": list(self.folders)}

    def roots(self) -> list[str]:
        return list(self.folders) or folders(self.files)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        for start in range(0, len(self.files), rows):
            files = self.files[start : start + rows]
            yield {"files": list(files), "rows": len(files)}

    def items(self, chunk: Chunk) -> Iterator[Item]:
        return (Item(path, path, path) for path in chunk["files"])


def read_list(path: str | Path) -> list[str]:
    """The files a text file names, one a line; relative names are relative to the list."""
    try:
        lines = Path(path).read_text("utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise MediaError(f"{describe(path)} cannot be read: {error.strerror}") from error
    files = [str(Path(path).parent / line.strip()) for line in lines if line.strip()]
    if not files:
        raise ConfigError(f"{path} names no files")
    return files


# --- lines of text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextLines:
    """UTF-8 text files with one text a line; empty lines are skipped. The id is FILE:LINE, counted from 1."""

    files: tuple[str, ...]
    type: ClassVar[str] = "text"
    kind: ClassVar[str] = "text"

    def settings(self) -> dict[str, Any]:
        return {"type": self.type}

    def roots(self) -> list[str]:
        return folders(self.files)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        for file in self.files:
            with open_regular(file) as lines:
                start, first, number, count = 0, 1, 0, 0
                for number, line in enumerate(lines, 1):
                    count += bool(line.strip())
                    if count == rows:
                        yield {"file": file, "start": start, "stop": lines.tell(), "line": first, "rows": count}
                        start, first, count = lines.tell(), number + 1, 0
                if count:
                    yield {"file": file, "start": start, "stop": lines.tell(), "line": first, "rows": count}

    def items(self, chunk: Chunk) -> Iterator[Item]:
        file, number = chunk["file"], chunk["line"]
        with open_regular(file) as lines:
            lines.seek(chunk["start"])
            while lines.tell() < chunk["stop"]:
                raw = lines.readline().strip()
                if raw:
                    yield _line(file, number, raw)
                number += 1


def _line(file: str, number: int, raw: bytes) -> Item:
    name = f"{file}:{number}"
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Item(name, file, MediaError(f"line {number} of {describe(file)} is not UTF-8: {error}"), str(number))
    return Item(name, file, text, str(number), text)


# --- WebDataset ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tars:
    """WebDataset shards: members that share a name up to its first dot are one sample, and stand together.

    A sample's picture is its member with a picture's suffix, its text the member `.txt` (or `.caption`), its metadata
    the fields of its member `.json`. The id is SHARD/KEY. (https://github.com/webdataset/webdataset, "The WebDataset
    Format".)
    """

    files: tuple[str, ...]
    type: ClassVar[str] = "tar"
    kind: ClassVar[str] = "image"

    def settings(self) -> dict[str, Any]:
        return {"type": self.type}

    def roots(self) -> list[str]:
        return folders(self.files)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Only the headers are read: one seek a member."""
        for file in self.files:
            starts, end = _sample_starts(file)
            for first in range(0, len(starts), rows):
                stop = starts[first + rows] if first + rows < len(starts) else end
                count = min(rows, len(starts) - first)
                yield {"file": file, "start": starts[first], "stop": stop, "rows": count}

    def items(self, chunk: Chunk) -> Iterator[Item]:
        sample: dict[str, Any] = {}
        key = None
        try:
            for member, tar in _members(chunk["file"], chunk["start"], chunk["stop"]):
                name, suffix = _split(member.name)
                if key is not None and name != key:
                    yield _sample(chunk["file"], key, sample)
                    sample = {}
                key, sample[suffix] = name, _read_member(tar, member)
        except (tarfile.TarError, OSError, EOFError) as error:
            if key is None:
                key = "?"
            cut = MediaError(f"{describe(chunk['file'])} is damaged or cut short after {key!r}: {error}")
            yield Item(f"{chunk['file']}/{key}", chunk["file"], cut, key)
            return
        if key is not None:
            yield _sample(chunk["file"], key, sample)


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), f".{suffix.lower()}"


def _sample_starts(file: str) -> tuple[list[int], int]:
    starts, key, end = [], None, 0
    try:
        for member, tar in _members(file, 0, None):
            name, _ = _split(member.name)
            if name != key:
                starts.append(tar.here)
                key = name
            end = tar.fileobj_end
    except (tarfile.TarError, OSError, EOFError) as error:
        if not starts:
            raise MediaError(f"{describe(file)} cannot be read as a tar: {error}") from error
        # Cut short: what is whole is embedded, and the chunk that runs into the damage says so.
        end = Path(file).stat().st_size
    return starts, end


class _Tar:
    """The archive being walked, and where in the file the present member begins and ends."""

    def __init__(self, tar: tarfile.TarFile):
        self.tar, self.here, self.fileobj_end = tar, 0, 0


def _members(file: str, start: int, stop: int | None) -> Iterator[tuple[tarfile.TarInfo, _Tar]]:
    """Regular members whose headers lie in [start, stop), without unpacking any."""
    with open_regular(file) as handle:
        size = handle.seek(0, 2)
        handle.seek(start)
        if not size:
            raise tarfile.ReadError("the file is empty")
        # TarFile reads the first header as it opens, at the present position, and offsets count from there on.
        with tarfile.TarFile(fileobj=handle, mode="r", errorlevel=2) as tar:
            walk, begin = _Tar(tar), start
            while (stop is None or begin < stop) and (member := tar.next()) is not None:
                walk.here, begin = begin, tar.offset
                if begin > size:
                    raise tarfile.ReadError("unexpected end of data")
                walk.fileobj_end = begin
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header it met
                if member.isreg():
                    yield member, walk


def _read_member(walk: _Tar, member: tarfile.TarInfo) -> bytes | MediaError:
    if member.size > MAX_MEMBER:
        return MediaError(f"member {member.name!r} has {member.size} bytes; the limit is {MAX_MEMBER}")
    file = walk.tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _sample(file: str, key: str, sample: dict[str, Any]) -> Item:
    name = f"{file}/{key}"
    picture = next((s for s in sample if s.rpartition(".")[2] and f".{s.rpartition('.')[2]}" in PICTURE_SUFFIXES), None)
    text, metadata = sample.get(".txt", sample.get(".caption")), {}
    if isinstance(raw := sample.get(".json"), bytes):
        try:
            parsed = json.loads(raw)
            metadata = parsed if isinstance(parsed, dict) else {}
        except ValueError:
            metadata = {}
    caption = text.decode("utf-8", "replace").strip() if isinstance(text, bytes) else metadata.get("caption")
    if picture is None:
        data: Any = MediaError(f"sample {key!r} of {describe(file)} holds no picture, only {sorted(sample)}")
        return Item(name, file, data, key, None, metadata=metadata)
    inside = f"{key}{picture}"
    return Item(name, file, sample[picture], inside, caption if isinstance(caption, str) else None, metadata=metadata)


# --- Parquet ---------------------------------------------------------------------------------------------------------

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes", "path", "image_path", "file", "file_name")
_TEXT_COLUMNS = ("text", "caption", "txt", "TEXT")


@dataclass(frozen=True)
class ParquetRows:
    """Rows of Parquet files with a picture each: its bytes, or its path relative to the file.

    image  the column: bytes, text (a path), or Hugging Face's {"bytes", "path"}; found by name when it is not given.
           `image=None` and a column of text without pictures: the texts are embedded
    text   the column of captions, kept beside the vector
    id     the column of ids; FILE#ROW otherwise
    keep   more columns to keep as metadata
    shown  "image" or "text": which of the two the model is shown
    """

    files: tuple[str, ...]
    image: str | None = None
    text: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    shown: Literal["image", "text"] = "image"
    type: ClassVar[str] = "parquet"

    @property
    def kind(self) -> str:
        return self.shown

    def settings(self) -> dict[str, Any]:
        found = self._columns(self.files[0]) if self.files else {"image": self.image, "text": self.text}
        return {"type": self.type, **found, "id": self.id, "keep": list(self.keep), "shown": self.shown}

    def roots(self) -> list[str]:
        return folders(self.files)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        for file in self.files:
            total = _parquet(file).metadata.num_rows
            for start in range(0, total, rows):
                yield {"file": file, "start": start, "stop": min(start + rows, total), "rows": min(rows, total - start)}

    def items(self, chunk: Chunk) -> Iterator[Item]:
        names = self._columns(chunk["file"])
        wanted = [n for n in dict.fromkeys((names["image"], names["text"], self.id, *self.keep)) if n]
        row = chunk["start"]
        for record in _rows(chunk["file"], wanted, chunk["start"], chunk["stop"]):
            yield self._item(chunk["file"], row, record, names)
            row += 1

    def _item(self, file: str, row: int, record: dict[str, Any], names: dict[str, str | None]) -> Item:
        name = f"{file}#{row}" if self.id is None else str(record[self.id])
        caption = record.get(names["text"]) if names["text"] else None
        caption = caption if isinstance(caption, str) else None
        if self.shown == "text":
            missing = MediaError(f"row {row} of {describe(file)} has no text")
            data: Any = caption if caption and caption.strip() else missing
        else:
            data = _picture(record[str(names["image"])], file, row)
        source = data if isinstance(data, str) and self.shown == "image" else file
        inside = "" if source is not file else str(row)
        return Item(name, source, data, inside, caption, metadata={key: record[key] for key in self.keep})

    def _columns(self, file: str) -> dict[str, str | None]:
        schema = _parquet(file).schema_arrow.names
        asked = [n for n in (self.image, self.text, self.id, *self.keep) if n is not None]
        if unknown := [name for name in asked if name not in schema]:
            raise ConfigError(f"{file} has no columns {unknown}; it has {schema}")
        text = self.text or next((name for name in _TEXT_COLUMNS if name in schema), None)
        image = self.image or next((name for name in _IMAGE_COLUMNS if name in schema), None)
        if self.shown == "image" and image is None:
            raise ConfigError(
                f"{file} has no column of pictures that goes by a known name; choose image= from {schema}"
            )
        if self.shown == "text" and text is None:
            raise ConfigError(f"{file} has no column of text that goes by a known name; choose text= from {schema}")
        return {"image": image if self.shown == "image" else None, "text": text}


def _parquet(file: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("pyarrow", "retrieval", str(error)) from error
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise MediaError(f"{describe(file)} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _rows(file: str, columns: list[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Records of rows [start, stop), a few at a time; row groups outside are not read."""
    parquet, first = _parquet(file), 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if first < stop and first + count > start:
            at = first
            for batch in parquet.iter_batches(256, row_groups=[group], columns=columns):
                lo, hi = max(start - at, 0), min(stop - at, len(batch))
                if lo < hi:
                    yield from batch.slice(lo, hi - lo).to_pylist()
                at += len(batch)
        first += count


def _picture(value: Any, file: str, row: int) -> Any:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return str(Path(file).parent / value)
    return MediaError(f"row {row} of {describe(file)} has no picture")


# --- videos ----------------------------------------------------------------------------------------------------------

VideoMode = Literal["frames", "clips"]


@dataclass(frozen=True)
class Videos:
    """Video files, as single frames or as clips of a few frames that make one vector, with their times in seconds.

    mode     "frames": `fps` of them a second; "clips": `frames` of every `seconds`
    """

    files: tuple[str, ...]
    mode: VideoMode = "frames"
    fps: float = 1.0
    seconds: float = 10.0
    frames: int = 8
    type: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        if self.mode not in ("frames", "clips"):
            raise ConfigError(f"video={self.mode!r}; choose 'frames' or 'clips'")
        if not (0 < self.fps <= 1000 and 0 < self.seconds < math.inf and 1 <= self.frames <= 1024):
            raise ConfigError(f"fps={self.fps}, seconds={self.seconds}, frames={self.frames}; expected more than 0")

    @property
    def kind(self) -> str:
        return "image" if self.mode == "frames" else "clip"

    def settings(self) -> dict[str, Any]:
        sizes = {"fps": self.fps} if self.mode == "frames" else {"seconds": self.seconds, "frames": self.frames}
        return {"type": self.type, "mode": self.mode, **sizes}

    def roots(self) -> list[str]:
        return folders(self.files)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """How many rows a video makes is known once it is read; a hundred is the guess."""
        each = max(1, rows // 100)
        for start in range(0, len(self.files), each):
            yield {"files": list(self.files[start : start + each]), "rows": None}

    def items(self, chunk: Chunk) -> Iterator[Item]:
        for file in chunk["files"]:
            try:
                yield from self._frames(file) if self.mode == "frames" else self._clips(file)
            except (MediaError, ValueError, OSError) as error:
                yield Item(file, file, error if isinstance(error, MediaError) else MediaError(str(error)))

    def _frames(self, file: str) -> Iterator[Item]:
        info = read_video(file, max_frames=1)
        rate = info.fps or 1.0
        count = max(1, math.ceil(info.num_frames / rate * self.fps - 1e-9))
        numbers = sorted({min(round(i * rate / self.fps), info.num_frames - 1) for i in range(count)})
        for start in range(0, len(numbers), FRAMES_AT_ONCE):
            video = read_video(file, indices=numbers[start : start + FRAMES_AT_ONCE])
            for frame, index, time in zip(video.frames, video.indices, video.timestamps, strict=True):
                time = round(float(time), 6)
                yield Item(f"{file}#{index}", file, frame, str(index), start=time, end=round(time + 1 / self.fps, 6))

    def _clips(self, file: str) -> Iterator[Item]:
        info = read_video(file, max_frames=1)
        duration = max(info.duration, 1 / info.fps if info.fps else 0.0)
        rate = info.fps or info.num_frames / duration
        for number in range(max(1, math.ceil(duration / self.seconds - 1e-6))):
            start, end = number * self.seconds, min((number + 1) * self.seconds, duration)
            first, last = int(start * rate), max(int(start * rate), math.ceil(end * rate) - 1)
            last = min(last, info.num_frames - 1)
            chosen = np.linspace(min(first, last), last, min(self.frames, last - first + 1) or 1).round().astype(int)
            video = read_video(file, indices=[int(index) for index in chosen])
            yield Item(f"{file}#{number}", file, video.frames, str(number), start=round(start, 6), end=round(end, 6))


# --- opening one item again ------------------------------------------------------------------------------------------


def picture_of(source: str, inside: str, start: float | None) -> Any:
    """What `read_image` reads to show a row again: the path, the bytes of a tar member or of a Parquet row, or a frame.

    Raises MediaError when it is not there any more.
    """
    if not inside:
        return source
    kind = _kind(source)
    if kind == "tar":
        for member, tar in _members(source, 0, None):
            if member.name == inside:
                data = _read_member(tar, member)
                if isinstance(data, MediaError):
                    raise data
                return data
        raise MediaError(f"{describe(source)} has no member {inside!r}")
    if kind == "parquet":
        names = ParquetRows((source,))._columns(source)
        records = list(_rows(source, [str(names["image"])], int(inside), int(inside) + 1))
        if not records:
            raise MediaError(f"{describe(source)} has no row {inside}")
        found = _picture(records[0][str(names["image"])], source, int(inside))
        if isinstance(found, MediaError):
            raise found
        return found
    if kind == "video":
        return read_video(source, max_frames=1, start=start or 0.0).frames[0]
    raise MediaError(f"{describe(source)} holds a text, not a picture")
