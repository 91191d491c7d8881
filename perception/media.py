"""Files, bytes and arrays to pictures and frames. What the bytes are is decided by looking at them, never by a name.

Nothing here fetches: a source is a path to a regular file, bytes, an open file, or something already decoded. Paths are
opened by us and handed on as open files, so no string of a user's ever reaches FFmpeg, which would take `concat:...` or
`http://...` for an order.

N frames  H W pixels
"""

import io
import logging
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from perception.errors import ConfigError, LimitError, MediaError
from perception.settings import is_number

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_PIXELS = 50_000_000  # of one picture or one frame, checked in the header, before anything is decoded
MAX_CLIP_PIXELS = 1_000_000_000  # of all frames of one clip together: 3 GB of uint8
MAX_STREAM_BYTES = 500_000_000  # read from a stream that cannot seek
HEAD = 4096  # bytes looked at to tell what a file is

# Formats whose readers are Pillow's own or a codec's. EPS (it runs Ghostscript) and the rarely tested ones stay out.
PICTURE_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp"),
)
# The container, as `sniff` names it, and the FFmpeg demuxer that is allowed to open it.
DEMUXERS = {
    "an MP4 or QuickTime video": "mov",
    "a Matroska or WebM video": "matroska",
    "an AVI video": "avi",
    "an Ogg file": "ogg",
    "an MPEG transport stream": "mpegts",
    "an MPEG program stream": "mpeg",
    "an FLV video": "flv",
    "an ASF or WMV video": "asf",
}
PICTURES = (
    *("a JPEG picture", "a PNG picture", "a GIF picture", "a WebP picture", "a TIFF picture", "a BMP picture"),
    *("a Netpbm picture", "an icon", "a QOI picture", "a JPEG 2000 picture", "an AVIF picture"),
)
# What FFmpeg would obey: lists of other files to open. Looked for in the text a file starts with.
PLAYLISTS = {
    b"#extm3u": "an HLS playlist",
    b"ffconcat version": "an ffconcat script",
    b"<mpd": "a DASH manifest",
    b"dash:profile": "a DASH manifest",
    b"<smoothstreamingmedia": "a Smooth Streaming manifest",
    b"c=in ip": "an SDP session",
    b"[playlist]": "a playlist",
    b"<assetmap": "an IMF package",
}


# --- sources ------------------------------------------------------------------------------------------------------


def sniff(head: bytes) -> str:
    """What a file is, in words, from its first bytes: "a PNG picture", "an HTML page", "unknown binary data"."""
    if not head:
        return "an empty file"
    text = head.split(b"\0", 1)[0].lower()
    for mark, kind in PLAYLISTS.items():
        if mark in text:
            return kind
    kind = _binary_kind(head) or _text_kind(head, text) or "unknown binary data"
    # FFmpeg looks for playlists in the text before the first zero byte; every container has one early.
    return "unknown binary data" if kind in DEMUXERS and b"\0" not in head else kind


def _binary_kind(head: bytes) -> str | None:
    box = head[4:8]
    if box == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "an AVIF picture"
    if box == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture"
    if box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot") and b"\0" in head[:4]:
        return "an MP4 or QuickTime video"
    if head[:4] == b"RIFF":
        return {b"WEBP": "a WebP picture", b"AVI ": "an AVI video"}.get(head[8:12], "a RIFF file without pictures")
    if head[:1] == b"G" and len(head) > 376 and head[188:189] == head[376:377] == b"G":
        return "an MPEG transport stream"
    starts = {
        b"\xff\xd8\xff": "a JPEG picture",
        b"\x89PNG\r\n\x1a\n": "a PNG picture",
        b"GIF8": "a GIF picture",
        b"II*\0": "a TIFF picture",
        b"MM\0*": "a TIFF picture",
        b"II+\0": "a TIFF picture",
        b"MM\0+": "a TIFF picture",
        b"BM": "a BMP picture",
        b"\0\0\1\0": "an icon",
        b"qoif": "a QOI picture",
        b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
        b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
        b"\x1a\x45\xdf\xa3": "a Matroska or WebM video",
        b"OggS": "an Ogg file",
        b"FLV\1": "an FLV video",
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "an ASF or WMV video",
        b"\0\0\1\xba": "an MPEG program stream",
        b"%PDF": "a PDF document",
        b"%!PS": "a PostScript program",
        b"PK\3\4": "a ZIP archive",
        b"\x1f\x8b": "a gzip archive",
        b"\x7fELF": "a program",
        b"ID3": "an MP3 file",
        b"fLaC": "a FLAC file",
    }
    for start, kind in starts.items():
        if head.startswith(start):
            return kind
    return "a Netpbm picture" if re.match(rb"P[1-7][\s#]", head) else None


def _text_kind(head: bytes, text: bytes) -> str | None:
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if b"<svg" in text:
        return "an SVG drawing"
    if b"<html" in text or b"<!doctype html" in text:
        return "an HTML page"
    if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<?xml"):
        return "an XML document"
    if b"\0" in head:
        return None
    try:
        # The last bytes may be half a character.
        printable = head.decode().isprintable() or bool(re.fullmatch(r"[^\x00-\x08\x0e-\x1f]*", head.decode()))
    except UnicodeDecodeError as error:
        printable = error.start > len(head) - 4 and len(head) >= 4
    return "plain text" if printable else None


def describe(source: object) -> str:
    """A source for messages and logs: one line, escaped, short."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"
    return name if len(name) <= 200 else f"{name[:120]}...{name[-60:]}"


@contextmanager
def open_media(source: object) -> Iterator[BinaryIO]:
    """A seekable binary file for a path, bytes, or an open file. Closes what it opened, and only that.

    Raises MediaError for anything but a regular file: folders, FIFOs, devices, URLs, names too long.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(bytes(source))
    elif isinstance(source, str | os.PathLike):
        with open_regular(os.fspath(source)) as file:
            yield file
    elif hasattr(source, "read"):
        stream = cast(BinaryIO, source)
        if hasattr(stream, "seekable") and stream.seekable():
            stream.seek(0)
            yield stream
            return
        data = stream.read(MAX_STREAM_BYTES + 1)
        if not isinstance(data, bytes):
            raise MediaError(f"{describe(source)} reads {type(data).__name__}; expected a file opened in binary mode")
        if len(data) > MAX_STREAM_BYTES:
            raise LimitError(f"{describe(source)} holds more than {MAX_STREAM_BYTES} bytes (MAX_STREAM_BYTES)")
        yield io.BytesIO(data)
    else:
        raise MediaError(
            f"{describe(source)} is no media; expected a path, bytes, a binary file, a picture or an array"
        )


def open_regular(path: str | bytes) -> BinaryIO:
    """Open a regular file for reading, and nothing else: a FIFO would wait for ever, a device has effects."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):  # noqa: PTH116 - the path may be bytes
            raise MediaError(f"{describe_path(path)} is {_irregular(mode)}; expected a regular file")
        # Between the look and the open the name may have come to mean something else: do not block, and look again.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
            os.close(handle)
            raise MediaError(f"{describe_path(path)} is {_irregular(mode)}; expected a regular file")
    except MediaError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        text = os.fsdecode(path)
        if isinstance(error, FileNotFoundError | ValueError) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
            raise MediaError(f"{describe_path(path)} looks like a URL; nothing is fetched here, give a file") from error
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError(f"{describe_path(path)} cannot be opened: {why}") from error
    return os.fdopen(handle, "rb")


def describe_path(path: str | bytes) -> str:
    return describe(os.fsdecode(path))


def _irregular(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((kind for test, kind in kinds.items() if test(mode)), "no ordinary file")


# --- pictures -----------------------------------------------------------------------------------------------------


def read_image(
    source: object,
    *,
    orient: bool = True,
    max_pixels: int = MAX_PIXELS,
    allow_truncated: bool = False,
    at_least: int | None = None,
) -> Image.Image:
    """A picture, decoded, in the mode its file has (L, P, RGBA, CMYK, ...); `to_rgb` makes it RGB.

    source           path | bytes | binary file | PIL image | uint8 array or tensor: H W, H W C or C H W with 1, 3 or 4
                     channels. Where both ends could be channels, NumPy means H W C and torch means C H W
    orient           turn the picture as its EXIF tag asks (a TIFF Pillow turns in any case)
    max_pixels       LimitError above it, from the header, before anything is decoded
    allow_truncated  a JPEG cut short gives what is there, the rest grey; other formats are refused in any case
    at_least         a JPEG in a file may be decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time, as long
                     as no side falls below this; other sources come whole

    Sixteen-bit grey is scaled to eight bits by 1/257 (Pillow would clip it, to nearly white), and float and 32-bit
    grey become eight-bit grey as `grey_codes` says. An animation or a file of many pages gives its first picture.
    Alpha stays in the picture; `to_rgb` drops it, as the published models' preprocessing does, and `flatten` lays it
    over a colour.

    Raises MediaError for what is no picture, LimitError for what is too large.
    """
    if isinstance(source, Image.Image):
        image = _load(source, "the PIL image", max_pixels)
        return grey_codes(_upright(image) if orient else image)
    if isinstance(source, np.ndarray | Tensor):
        return _from_array(source, max_pixels)
    with open_media(source) as file:
        name = describe(source)
        try:
            image = _load(_open_picture(file, name), name, max_pixels, at_least)
        except MediaError:
            file.seek(0)
            if not allow_truncated or sniff(file.read(HEAD)) != "a JPEG picture":
                raise
            # An end marker where the data ends. Pillow has a switch for this, but it is global and threads share it.
            file.seek(0)
            whole = io.BytesIO(file.read() + b"\xff\xd9")
            image = _load(_open_picture(whole, name), name, max_pixels, at_least)
        image = _upright(image) if orient else image
        if getattr(image, "is_animated", False):
            image = image.copy()  # of its own: the file closes
        return grey_codes(image)


def _open_picture(file: BinaryIO, name: str) -> Image.Image:
    file.seek(0)
    kind = sniff(file.read(HEAD))
    file.seek(0)
    Image.init()
    try:
        return Image.open(file, formats=[known for known in PICTURE_FORMATS if known in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LimitError(f"{name}: {_first_line(error)}") from error
    except Exception as error:  # decoders meet hostile files with every exception there is
        unknown = isinstance(error, Image.UnidentifiedImageError) or kind not in PICTURES
        detail = f" ({_first_line(error)})" if not unknown else ", cut short or damaged" if kind in PICTURES else ""
        raise MediaError(f"{name} cannot be read as a picture: it holds {kind}{detail}") from error


def _load(image: Image.Image, name: str, max_pixels: int, at_least: int | None = None) -> Image.Image:
    _check_size(image.width, image.height, name, max_pixels)
    try:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # the inverse transform of a JPEG at a smaller size; else nothing
        image.load()
    except Exception as error:  # as above
        what = f"{image.format or 'picture'} of {image.width}x{image.height}"
        raise MediaError(f"{name}: the {what} is damaged or cut short ({_first_line(error)})") from error
    return image


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels: {width}x{height}")
    if width * height > max_pixels:
        raise LimitError(f"{name} is {width}x{height}, {width * height} pixels; the limit is max_pixels={max_pixels}")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF around good pixels is common; the pixels count
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(key, None)  # it is upright now: who reads it again must not turn it again
    return turned


def grey_codes(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits to mode L; other modes come back as they are.

    I;16   sixteen bits, times 1/257
    I      as 0..255 when nothing is larger, else as sixteen bits; MediaError below 0 or above 65535
    F      as 0..1 when nothing is larger, else as 0..255; MediaError outside, and for NaN
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if image.mode.startswith("I;16"):  # in integers, which take half the memory: this is round(v / 257) for every v
        codes = np.asarray(image).astype(np.uint32)
        codes += 128
        codes //= 257
        return Image.fromarray(codes.astype(np.uint8))
    values = np.array(image, dtype=np.float64)  # a copy, changed in place below: these are eight bytes a pixel
    low, high = float(values.min()), float(values.max())
    tops = (255, 65535) if image.mode == "I" else (1, 255)
    top = tops[0] if high <= tops[0] else tops[1]
    if not (low >= 0 and high <= top):  # NaN compares false
        raise MediaError(f"a grey picture of mode {image.mode} has values {low:g} to {high:g}; scale them to 0..255")
    values *= 255 / top
    np.rint(values, out=values)
    return Image.fromarray(values.astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as the published preprocessing makes it: alpha and transparent colours are dropped, not blended.

    Raises MediaError for a colour space that Pillow cannot convert.
    """
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:  # dropped anyway, and Pillow warns about some forms of it
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise MediaError(f"a picture of mode {image.mode} cannot be made RGB: {_first_line(error)}") from error


def flatten(image: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """RGB with the transparent parts laid over a colour, for drawings whose hidden pixels mean nothing."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image.convert("RGBA")).convert("RGB")


def _from_array(array: np.ndarray | Tensor, max_pixels: int) -> Image.Image:
    given = f"{type(array).__name__} {tuple(array.shape)} of {str(array.dtype).removeprefix('torch.')}"
    channels_first = isinstance(array, Tensor)
    if str(array.dtype).removeprefix("torch.") != "uint8":
        hint = "; for values 0..1 give (x * 255).round() as uint8" if "float" in str(array.dtype) else ""
        raise MediaError(f"{given} is no picture; expected uint8, 0 to 255{hint}")
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if values.ndim == 2:
        values = values[..., None]
    first, last = (values.ndim == 3 and values.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if not (first or last):
        hint = "; for many frames use PixelSpec.frames or a list" if values.ndim == 4 else ""
        raise MediaError(f"{given} is no picture; expected H W, H W C or C H W with 1, 3 or 4 channels{hint}")
    if first and (channels_first or not last):
        values = values.transpose(1, 2, 0)
    height, width, channels = values.shape
    _check_size(width, height, given, max_pixels)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if channels == 1 else values))


def iter_images(folder: str | os.PathLike[str], *, recursive: bool = True) -> Iterator[Path]:
    """The pictures in a folder, by suffix, lazily: sorted within each folder, files before subfolders.

    Links to folders are followed; one that leads back to a folder it lies in is logged and skipped, and so is what
    cannot be listed. Names that are not UTF-8 come through as the paths Python gives them.

    Raises MediaError when `folder` is not one.
    """
    root = os.fspath(folder)
    try:
        os.scandir(root).close()
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise MediaError(f"{describe(root)} cannot be listed: {why}") from error
    return _walk(root, recursive, ())


def _walk(folder: str, recursive: bool, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        here = Path(folder).stat()
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            log.warning("skipped %s: a link back to a folder it lies in", describe(folder))
            return
        with os.scandir(folder) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        log.warning("skipped %s: %s", describe(folder), error.strerror)
        return
    folders = []
    for entry in listing:
        try:
            if entry.is_dir():
                folders.append(entry.path)
            elif Path(entry.name).suffix.lower() in PICTURE_SUFFIXES and entry.is_file():
                yield Path(entry.path)
        except OSError as error:  # a link that loops on itself
            log.warning("skipped %s: %s", describe(entry.path), error.strerror)
    if recursive:
        for path in folders:
            yield from _walk(path, recursive, (*above, identity))


# --- which frames -------------------------------------------------------------------------------------------------


def uniform_frames(m: int, n: int) -> list[int]:
    """n of m positions, evenly, the first and the last among them: round(i * (m - 1) / (n - 1)), halves to even."""
    if m < 1 or n < 1:
        raise ConfigError(f"{n} of {m} positions: both must be 1 or more")
    return [0] if n == 1 else [round(i * (m - 1) / (n - 1)) for i in range(n)]


def benchmark_frames(T: int, N: int) -> list[int]:
    """N of T frames as the CLIP video benchmarks take them: int(i * (T - 1) / (N - 1)), the middle one for N = 1."""
    if T < 1 or N < 1:
        raise ConfigError(f"{N} of {T} frames: both must be 1 or more")
    return [T // 2] if N == 1 else [int(i * (T - 1) / (N - 1)) for i in range(N)]


def choose_frames(
    num_frames: int,
    fps: float,
    max_frames: int,
    start: float | None = None,
    end: float | None = None,
    sampling_fps: float = 1,
) -> list[int]:
    """Which frames a video language model sees: one a second, thinned evenly to `max_frames`.

    With fewer than `max_frames` seconds there is no use in one a second, and the frames are spread evenly over all of
    the window. `start` and `end` are seconds; `end` may lie past the last frame; an empty window gets a second frame.

    Raises ConfigError for times that are reversed, negative or past the end, and when the clip is slower than half of
    `sampling_fps`, which leaves no stride.
    """
    stride = _stride(fps, sampling_fps)
    if stride < 1:
        raise ConfigError(f"the clip has {fps:g} frames a second, too few to take {sampling_fps:g}; choose by number")
    first, last = _window(num_frames, fps, start, end)
    return _spread(first, last, stride, max_frames)


def _stride(fps: float, sampling_fps: float) -> int:
    if not (is_number(sampling_fps) and sampling_fps >= 1):
        raise ConfigError(f"sampling_fps={sampling_fps!r}; expected 1 or more")
    return round(fps / int(sampling_fps)) if math.isfinite(fps) and fps > 0 else 0


def _window(num_frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    if num_frames < 1:
        raise ConfigError(f"num_frames={num_frames}; expected 1 or more")
    _check_times(start, end)
    if (start is not None or end is not None) and not (math.isfinite(fps) and fps > 0):
        raise ConfigError(f"start and end need frames a second, but the clip gives {fps}; choose frames with indices=")
    first = 0 if start is None else int(start * fps)
    last = num_frames - 1 if end is None else min(int(end * fps), num_frames - 1)
    if first > num_frames - 1:
        raise ConfigError(
            f"start={start:g} is past the end: frame {first} of {num_frames} ({num_frames / fps:.2f} seconds)"
        )
    if first == last:
        last = min(first + 1, num_frames - 1)
    return first, last


def _check_times(start: float | None, end: float | None) -> None:
    for name, time in (("start", start), ("end", end)):
        if time is not None and not (is_number(time) and time >= 0):
            raise ConfigError(f"{name}={time!r}; expected seconds from the beginning, 0 or more")
    if start is not None and end is not None and start > end:
        raise ConfigError(f"start={start:g} is after end={end:g}")


def _spread(first: int, last: int, stride: int, max_frames: int) -> list[int]:
    if not (is_number(max_frames) and max_frames >= 1 and max_frames == int(max_frames)):
        raise ConfigError(f"max_frames={max_frames!r}; expected a whole number, 1 or more")
    max_frames = int(max_frames)
    positions = range(first, last + 1, stride)
    if len(positions) > max_frames:
        return [positions[i] for i in uniform_frames(len(positions), max_frames)]
    if len(positions) == max_frames:
        return list(positions)
    length = last - first + 1
    return [first + i for i in uniform_frames(length, min(max_frames, length))]


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """What `read_video` was asked for; `pick` says which frames that is once the clip's length is known."""

    max_frames: int = 32
    start: float | None = None
    end: float | None = None
    sampling_fps: float = 1
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # What needs no clip is checked before one is opened.
        _stride(1.0, self.sampling_fps)
        _check_times(self.start, self.end)
        _spread(0, 0, 1, self.max_frames)
        if self.indices is None:
            return
        if not isinstance(self.indices, Iterable) or isinstance(self.indices, str | bytes):
            raise ConfigError(f"indices is {self.indices!r}; expected a list of frame numbers")
        if not len(self.indices):
            raise ConfigError("indices is empty; give at least one frame, or leave it out")
        for index in self.indices:
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
                raise ConfigError(f"indices has {index!r}; expected frame numbers, 0 or more")

    def pick(self, num_frames: int, fps: float) -> list[int]:
        if self.indices is not None:
            if (largest := max(self.indices)) >= num_frames:
                raise ConfigError(f"indices has {largest}, but the clip has {num_frames} frames, 0 to {num_frames - 1}")
            return [int(index) for index in self.indices]
        first, last = _window(num_frames, fps, self.start, self.end)
        # A clip of unknown or very low rate (a slide show) offers every frame: a stride of 0 is no choice.
        return _spread(first, last, max(1, _stride(fps, self.sampling_fps)), self.max_frames)


# --- videos -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames of a clip and where they come from.

    frames      N 3 H W uint8, RGB, upright
    timestamps  N seconds from the first frame of the clip
    indices     N frame numbers in the clip
    fps, num_frames, duration    of the whole clip; fps 0 when it has no rate
    backend     what decoded it: "torchcodec" | "pyav" | "pillow" | "array"
    """

    frames: Tensor
    timestamps: tuple[float, ...]
    indices: tuple[int, ...]
    fps: float
    num_frames: int
    duration: float
    backend: str

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class ClipLimits:
    """Named limits on a clip, checked before its frames are decoded."""

    max_pixels: int = MAX_PIXELS
    max_clip_pixels: int = MAX_CLIP_PIXELS

    def check(self, width: int, height: int, frames: int, name: str) -> None:
        _check_size(width, height, name, self.max_pixels)
        if width * height * frames > self.max_clip_pixels:
            raise LimitError(
                f"{name}: {frames} frames of {width}x{height} are {width * height * frames} pixels; "
                f"the limit is max_clip_pixels={self.max_clip_pixels}, ask for fewer frames"
            )


def read_video(
    source: object,
    *,
    max_frames: int = 32,
    start: float | None = None,
    end: float | None = None,
    sampling_fps: float = 1,
    indices: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_clip_pixels: int = MAX_CLIP_PIXELS,
    timeout: float = 30.0,
    backend: Literal["auto", "torchcodec", "pyav"] = "auto",
    isolate: bool = False,
) -> Video:
    """Some frames of a video, chosen as `choose_frames` does or named by `indices`.

    source   path | bytes | binary file of an MP4, MOV, MKV, WebM, AVI, Ogg, MPEG, FLV or WMV clip; an animated GIF,
             WebP or PNG, a TIFF of many pages; a folder of pictures or a list of them, one frame each, taken as one a
             second; a uint8 array or tensor N H W 3 or N 3 H W
    backend  "auto" takes torchcodec where it seeks exactly and PyAV elsewhere, and the other when one fails
    timeout  seconds until MediaError; a decoder that hangs is left behind in its thread
    isolate  decode a video in a child process, for files of strangers: a decoder that crashes or hangs is killed, and
             this process goes on. Starting one takes seconds. Pictures and animations are decoded here in any case

    Frames a damaged file no longer has are left out, with a warning.

    Raises MediaError for what is no video (playlists, which name other files, among it), LimitError for a clip beyond
    the limits, ConfigError for times and frames the clip does not have.
    """
    choice = FrameChoice(max_frames=max_frames, start=start, end=end, sampling_fps=sampling_fps, indices=indices)
    limits, name = ClipLimits(max_pixels, max_clip_pixels), describe(source)
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout}; expected seconds, more than 0")
    if isinstance(source, np.ndarray | Tensor):
        return _video_of_array(source, choice)
    if isinstance(source, str | os.PathLike) and Path(os.fspath(source)).is_dir():
        source = list(iter_images(source, recursive=False))
        if not source:
            raise MediaError(f"{name} is a folder without pictures")
    if isinstance(source, list | tuple):
        return _run(lambda: _video_of_pictures(cast(Sequence[object], source), choice, limits), timeout, name)

    with open_media(source) as file:
        kind = sniff(file.read(HEAD))
        file.seek(0)
        if kind not in PICTURES and kind not in DEMUXERS:
            raise MediaError(f"{name} cannot be read as a video: it holds {kind}")
        if kind in PICTURES:
            return _run(lambda: _video_of_animation(file, name, choice, limits), timeout, name)
        from perception import decoders

        if isolate:
            video, note = decoders.decode_in_child(file, kind, name, choice, limits, backend, timeout)
        else:
            reader = decoders.Reader(file, timeout)
            video, note = _run(
                lambda: decoders.decode(reader, DEMUXERS[kind], name, choice, limits, backend), timeout, name
            )
    if note:
        warnings.warn(f"{name} is damaged: {note}", stacklevel=2)
    return video


def _run(work: Callable[[], T], timeout: float, name: str) -> T:
    """The result of `work`, or MediaError after `timeout` seconds. A thread cannot be killed: it is left behind."""
    done: list[T] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            done.append(work())
        except BaseException as error:  # handed to the caller
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True, name="perception-decode")
    thread.start()
    thread.join(timeout)
    if failed:
        raise failed[0]
    if not done:
        raise MediaError(f"{name} took longer than timeout={timeout:g} seconds to decode")
    return done[0]


def _video_of_animation(file: BinaryIO, name: str, choice: FrameChoice, limits: ClipLimits) -> Video:
    image = _open_picture(file, name)
    _check_size(image.width, image.height, name, limits.max_pixels)
    frames, times, clock = {}, [], 0.0
    try:
        num_frames = getattr(image, "n_frames", 1)
        for index in range(num_frames):
            image.seek(index)
            if image.format == "WEBP":
                image.load()  # only then is the duration this frame's
            times.append(clock)
            # What browsers do with a frame that gives no duration; pages of a TIFF are a second each.
            clock += (image.info.get("duration") or 100) / 1000 if image.format != "TIFF" else 1.0
        fps = num_frames / clock
        chosen = choice.pick(num_frames, fps)
        limits.check(image.width, image.height, len(chosen), name)
        for index in sorted(set(chosen)):
            image.seek(index)
            frames[index] = _frame(to_rgb(grey_codes(image)))
    except (MediaError, LimitError, ConfigError):
        raise
    except Exception as error:  # as in _open_picture
        raise MediaError(f"{name}: the {image.format} animation is damaged ({_first_line(error)})") from error
    return Video(
        frames=_stack([frames[index] for index in chosen], name),
        timestamps=tuple(times[index] for index in chosen),
        indices=tuple(chosen),
        fps=fps,
        num_frames=num_frames,
        duration=clock,
        backend="pillow",
    )


def _video_of_pictures(sources: Sequence[object], choice: FrameChoice, limits: ClipLimits) -> Video:
    if not sources:
        raise MediaError("the list of frames is empty; give at least one picture")
    chosen = choice.pick(len(sources), 1.0)
    frames: list[Tensor] = []
    for index in chosen:
        image = read_image(sources[index], max_pixels=limits.max_pixels)
        limits.check(image.width, image.height, len(chosen), f"frame {index}")
        frames.append(_frame(to_rgb(image)))
    return Video(
        frames=_stack(frames, "the list of frames"),
        timestamps=tuple(float(index) for index in chosen),
        indices=tuple(chosen),
        fps=1.0,
        num_frames=len(sources),
        duration=float(len(sources)),
        backend="pillow",
    )


def _video_of_array(array: np.ndarray | Tensor, choice: FrameChoice) -> Video:
    frames = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    given = f"{type(array).__name__} {tuple(array.shape)} of {str(array.dtype).removeprefix('torch.')}"
    channels = frames.ndim == 4 and 3 in (frames.shape[1], frames.shape[3])
    if not channels or frames.dtype != torch.uint8 or not frames.numel():
        raise MediaError(f"{given} is no clip; expected uint8 N 3 H W or N H W 3")
    if frames.shape[1] != 3 or (frames.shape[3] == 3 and not isinstance(array, Tensor)):
        frames = frames.permute(0, 3, 1, 2)
    chosen = choice.pick(len(frames), 1.0)
    return Video(
        frames=frames[chosen].contiguous(),
        timestamps=tuple(float(index) for index in chosen),
        indices=tuple(chosen),
        fps=1.0,
        num_frames=len(frames),
        duration=float(len(frames)),
        backend="array",
    )


def _frame(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _stack(frames: list[Tensor], name: str) -> Tensor:
    sizes = sorted({(frame.shape[2], frame.shape[1]) for frame in frames})
    if len(sizes) > 1:
        raise MediaError(f"{name} has frames of several sizes ({sizes[0]}, {sizes[1]}, ...); resize them to one first")
    return torch.stack(frames)


def draw_box(
    frames: Tensor,
    indices: Sequence[int],
    boxes: Mapping[str, Sequence[float] | None] | Mapping[int, Sequence[float] | None],
    *,
    colour: tuple[int, int, int] = (255, 0, 0),
    width: int = 4,
) -> Tensor:
    """Draw one rectangle on each frame that has a box: the way a video model is asked about a region.

    frames   N 3 H W uint8; not changed
    indices  N frame numbers
    boxes    frame number, as a number or in text, to x1, y1, x2, y2 in pixels, or None
    return   N 3 H W uint8
    """
    if len(indices) != len(frames):
        raise ConfigError(f"{len(frames)} frames came with {len(indices)} indices")
    try:
        by_number = {int(number): box for number, box in boxes.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"boxes of the frames {str(list(boxes))[:80]}; expected frame numbers") from error
    drawn = frames.clone()
    for position, index in enumerate(indices):
        if (box := by_number.get(int(index))) is None:
            continue
        listed = isinstance(box, Iterable) and not isinstance(box, str | bytes) and len(box) == 4
        if not listed or not all(map(is_number, box)) or box[0] > box[2] or box[1] > box[3]:
            raise ConfigError(f"the box of frame {index} is {str(box)[:80]}; expected x1, y1, x2, y2 in rising order")
        image = Image.fromarray(frames[position].permute(1, 2, 0).cpu().numpy())
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2], box[3]), outline=colour, width=width)
        drawn[position] = _frame(image)
    return drawn


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__


__all__: list[Any] = [
    "FrameChoice",
    "Video",
    "benchmark_frames",
    "choose_frames",
    "draw_box",
    "flatten",
    "iter_images",
    "read_image",
    "read_video",
    "sniff",
    "to_rgb",
    "uniform_frames",
]
